"""The table of a GPU: what is measured in which order, what a short time or a failure leaves out, and what is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest

from qvit.bench.ceilings import Ceilings
from qvit.bench.run import Settings
from qvit.errors import InputError

SMALL = ["--models", gpu.SMALL]
HALF = ["--residual", "float16"]


def both(*widths: str) -> list[str]:
    """Of both types of the residual stream."""
    return [f"{residual}_{width}" for residual in ("float16", "float32") for width in widths]


class Machine:
    """Plays the GPU; a contestant takes a minute."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made: list[tuple[str, int, str]] = []
        self.compared: list[tuple[str, int, list[str], list[str], bool]] = []
        self.timed: list[tuple[str, bool]] = []
        self.broken: set[str] = set()

    def make(self, model: str, bits: int, path: Path, residual: str) -> None:
        if f"{model} {bits}" in self.broken:
            raise InputError(f"{model} cannot be made with {bits} bits")
        self.made.append((model, bits, residual))
        path.write_bytes(b"")

    def compare(
        self, paths: list[Path], peers: list[Any], settings: Settings, folder: Path, _progress: Any, _note: Any
    ) -> list[dict[str, Any]]:
        assert (settings.engine, settings.device, settings.starts) == ("cuda", "cuda", 1)
        assert all(path.exists() for path in paths)
        model, batch = folder.name, settings.batches[0]
        names = [peer.name for peer in peers]
        widths = [path.stem.removeprefix(f"{model}_") for path in paths]
        self.compared.append((model, batch, widths, names, settings.float_images))
        self.now += 60 * (len(paths) + settings.float_images + len(peers))
        if f"{model} {batch}" in self.broken:
            raise InputError("The engine cuda cannot be measured")
        times = {"ms_median": 3.0, "ms_p10": 2.9, "ms_p90": 3.1, "images_per_s": 1000.0, "gpu_mb": 700.0, "start_seconds": 9.0}
        rows = []
        for width in widths:
            residual, bits = width.split("_")[0], int(width[-1])
            facts = {"model": model, "weight_bits": bits, "act_bits": bits, "residual": residual, "batch": batch, **times}
            rows.append({**facts, "engine": "cuda", "title": "engine", "input": "uint8"})
            ratios = {"ratio_to_peer": 2.5, "ratio_p10": 2.4, "ratio_p90": 2.6}
            rows += [{**facts, "peer": peer.name, "title": peer.title, "input": peer.dtype, **ratios} for peer in peers]
        return rows

    def apart(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ in self.broken:
            return None
        if function is gpu._ceilings:
            return Ceilings(3000.0, 700.0, 1400.0)
        path, _, ceilings, device, one_bit = arguments
        self.timed.append(("_".join(path.stem.split("_")[-2:]), one_bit))
        assert (path.suffix, ceilings.int8_tops, device) == (".qvit", 1400.0, "cuda")
        row = {"kernel": "gemm", "shape": "8 x 8 x 8", "launches": 12, "ms": 1.5, "percent": 100.0, "tops": 500.0}
        return [row | {"gb_per_s": 1000.0, "bound": "compute", "share_of_bound": 0.4}]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    played = Machine()
    monkeypatch.setattr(gpu, "make_random_model", played.make)
    monkeypatch.setattr(gpu, "compare", played.compare)
    monkeypatch.setattr(gpu, "apart", played.apart)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: played.now))
    return played


def main(*arguments: str) -> list[dict[str, Any]]:
    return gpu.main(arguments)


def test_the_whole_table(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    rows = main("--minutes", "60", "--json", str(path))
    assert sorted(machine.made) == sorted(
        (model, bits, residual)
        for residual in ("float16", "float32")
        for model, widths in ((gpu.TINY, (4, 2)), (gpu.BASE, (4, 2)), (gpu.SMALL, (4, 2, 3, 8)))
        for bits in widths
    )
    assert machine.compared == [
        (gpu.SMALL, 256, both("w4a4", "w2a2"), ["compile"], True),
        (gpu.SMALL, 1, both("w4a4", "w2a2"), ["compile"], False),
        (gpu.TINY, 256, both("w4a4", "w2a2"), ["compile"], False),
        (gpu.BASE, 256, both("w4a4", "w2a2"), ["compile"], False),
        (gpu.SMALL, 256, both("w4a4", "w2a2", "w3a3", "w8a8"), ["torchao", "eager-bf16", "tf32", "eager"], False),
    ]
    report = json.loads(path.read_text())
    assert report["schema"] == 1
    assert report["rows"] == rows
    assert [row["part"] for row in rows if "part" in row] == ["ceilings", *["kernels"] * 6]
    assert rows[0]["int8_tops"] == 1400.0
    kernels = [row for row in rows if row.get("part") == "kernels"]
    assert [(row["batch"], row["weight_bits"], row.get("codes"), row["share_of_bound"]) for row in kernels] == [
        (256, 4, None, 0.4),
        (1, 4, None, 0.4),
        *((batch, 2, codes, 0.4) for batch in (256, 1) for codes in (None, "bytes")),
    ]
    assert machine.timed == [*[("float16_w4a4", True)] * 2, *[("float16_w2a2", True), ("float16_w2a2", False)] * 2]
    assert {row["residual"] for row in kernels} == {"float16"}
    out, err = capsys.readouterr()
    assert err == ""
    assert "| deit_small_patch16_224 W2A2 as bytes, float16 | 1 | gemm 8 x 8 x 8 | 12 |" in out
    assert "| deit_small_patch16_224 W2A2 | 256 | torch.compile bf16 | bfloat16 | 3.000 (2.900 to 3.100) | 1000 | 2.50" in out
    assert main("--tables", str(path)) == rows
    table = capsys.readouterr().out
    assert out.endswith(table)
    assert table.rstrip().endswith("copies 3000 GB/s, bf16 700 TFLOP/s, int8 1400 TOP/s")


def test_what_there_is_no_time_for_is_left_out(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    rows = main("--minutes", "16", *SMALL, *HALF)  # 4, then 3, then 4 and as many peers as fit
    assert [(batch, len(widths), names) for _, batch, widths, names, _ in machine.compared] == [
        (256, 2, ["compile"]),
        (1, 2, ["compile"]),
        (256, 4, ["torchao", "eager-bf16", "tf32", "eager"]),
    ]
    machine.compared.clear()
    machine.now = 0.0
    main("--minutes", "13", *SMALL, *HALF)
    assert machine.compared[-1][3] == ["torchao", "eager-bf16"]
    machine.compared.clear()
    machine.now = 0.0
    main("--minutes", "6", *SMALL, *HALF)
    assert [batch for _, batch, *_ in machine.compared] == [256]
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "note: deit_small_patch16_224 at batch 256 beside tf32 and eager is left out: 360 s are left.",
        "note: deit_small_patch16_224 at batch 1 is left out: 120 s are left.",
        "note: deit_small_patch16_224 at batch 256 is left out: 120 s are left.",
    ]
    assert len(rows) > 5


def test_makers_have_few_threads_whatever_is_set(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many models are made at once; with as many threads each as there are cores they would take minutes."""
    monkeypatch.setenv("MKL_NUM_THREADS", "64")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen: list[tuple[str | None, str | None]] = []

    def make(*_: object) -> None:
        seen.append((os.environ.get("OMP_NUM_THREADS"), os.environ.get("MKL_NUM_THREADS")))

    monkeypatch.setattr(gpu, "make_random_model", make)
    gpu._files([gpu.Variant(gpu.TINY, 4, "float16")], Path("."))
    assert seen == [("2", "2")]
    assert (os.environ.get("OMP_NUM_THREADS"), os.environ["MKL_NUM_THREADS"]) == (None, "64")


def test_options(machine: Machine) -> None:
    main(
        "--minutes", "99", "--models", gpu.TINY, gpu.SMALL, "--batches", "256", "--bits", "3", "--vs", "eager", "torchao", *HALF
    )
    assert [job[:4] for job in machine.compared] == [
        (gpu.SMALL, 256, ["float16_w3a3"], ["eager", "torchao"]),
        (gpu.TINY, 256, ["float16_w3a3"], ["eager", "torchao"]),
    ]
    machine.compared.clear()
    main("--models", gpu.TINY, "--vs", "--residual", "float32")
    assert machine.compared == [(gpu.TINY, 256, ["float32_w4a4", "float32_w2a2"], [], False)]


def test_what_fails_is_left_out(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.broken = {f"{gpu.SMALL} 2", f"{gpu.BASE} 256", "_kernels"}
    rows = main("--minutes", "99", *HALF)
    assert [widths for _, _, widths, *_ in machine.compared] == [
        ["float16_w4a4"],
        ["float16_w4a4"],
        *[["float16_w4a4", "float16_w2a2"]] * 2,
        ["float16_w4a4", "float16_w3a3", "float16_w8a8"],
    ]
    assert {row["model"] for row in rows if "model" in row} == {gpu.SMALL, gpu.TINY}
    assert [row["part"] for row in rows if "part" in row] == ["ceilings"]
    assert capsys.readouterr().err.splitlines() == [
        "note: deit_small_patch16_224 cannot be made with 2 bits",
        "note: deit_base_patch16_224 at batch 256 is left out: The engine cuda cannot be measured",
    ]


def test_a_function_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.apart(sum, [1, 2]) == 3
    assert gpu.apart(max, []) is None
    assert capsys.readouterr().err.startswith("note: max are left out: ValueError: ")


def test_tables_of_the_docs_are_those_of_the_committed_results() -> None:
    """Line by line: `docs/performance-gpu.md` says nothing that was not measured."""
    root = Path(__file__).parents[2]
    results = [json.loads(path.read_text())["rows"] for path in (root / "benchmarks" / "results").glob("gpu-*.json")]
    measured = {line for rows in results for line in gpu._tables(rows).splitlines()}
    written = [line for line in (root / "docs" / "performance-gpu.md").read_text().splitlines() if line.startswith("| deit_")]
    assert len(written) > 20
    assert [line for line in written if line not in measured] == []
