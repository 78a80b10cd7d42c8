"""``qvit bench``, with the engine alone; its peers have tests of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit.bench.run
import qvit.cli.bench
from qvit.bench.run import Settings
from qvit.integer.model import IntegerModel
from qvit.report_file import usable_cores

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def test_an_engine_alone(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--vs", "none", "--batch", "1,3", "--threads", "1", "--rounds", 1)
    done = cli("bench", frozen_file, *options, "--json", report)
    assert (done.status, done.err) == (0, "")
    content = json.loads(report.read_text())
    rows = content["rows"]
    assert [(row["engine"], row["batch"], row["threads"]) for row in rows] == [("cpu", 1, 1), ("cpu", 3, 1)]
    for row in rows:
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_median"])
        assert 0.02 < row["start_seconds"] < 60
        assert row["rss_mb"] >= row["rss_now_mb"] > 10
        assert row["file_bytes"] == frozen_file.stat().st_size
        assert f"{row['ms_median']:.2f}" in done.out
    assert done.out.count("qvit cpu") == 2
    assert {row["residual"] for row in rows} == {"float32"}
    assert content["command"][:2] == ["qvit", "bench"]


def test_one_thread_and_all_by_default(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert cli("bench", frozen_file, "--vs", "none", "--rounds", 1, "--json", report).status == 0
    threads = [row["threads"] for row in json.loads(report.read_text())["rows"]]
    assert threads == sorted({1, usable_cores()})


def test_random_weights_with_a_rounded_residual_stream(
    cli: Cli, frozen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, bits: int, path: Path, residual: str) -> None:
        assert (name, bits) == ("deit_tiny_patch16_224", 4)
        model = IntegerModel.load(frozen_file)
        IntegerModel.from_tensors({**model.header, "residual": residual}, model.tensors).save(path)

    monkeypatch.setattr(qvit.bench.run, "make_random_model", make)
    report = tmp_path / "report.json"
    options = ("--vs", "none", "--threads", 1, "--rounds", 1, "--json", report)
    for wish, residual, title in (((), "float32", ""), (("--residual", "float16"), "float16", ", a float16 stream")):
        done = cli("bench", "deit_tiny_patch16_224", *wish, *options)
        assert (done.status, json.loads(report.read_text())["rows"][0]["residual"]) == (0, residual)
        assert done.out.splitlines()[0].rstrip().endswith(f"in most layers (mixed){title}")


def test_a_busy_machine_is_told(cli: Cli, frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (97.5, 0.0, 0.0))
    done = cli("bench", frozen_file, "--vs", "none", "--threads", 1, "--rounds", 1)
    assert done.status == 0
    assert "the machine is busy (load 97.5" in done.err


def test_on_a_gpu(cli: Cli, frozen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(file: Path, peers: list[Any], settings: Settings, *_rest: object) -> list[dict[str, Any]]:
        assert (file, settings.engine, settings.batches, settings.device) == (frozen_file, "cuda", [1, 256], "cuda")
        assert settings.float_images
        facts = {"model": "deit", "weight_bits": 4, "act_bits": 4, "batch": 256, "device": "Some GPU", "gpu_mb": 700.0}
        times = {"ms_median": 1.0, "ms_p10": 1.0, "ms_p90": 1.0, "images_per_s": 1.0, "start_seconds": 1.0, "file_bytes": 1}
        own = {**facts, **times, "engine": "cuda", "input": "uint8"}
        others = [{"peer": peer.name, "title": peer.title, "input": peer.dtype, "ratio_to_peer": 2.5} for peer in peers]
        return [own, *({**facts, **times, **other} for other in others)]

    monkeypatch.setattr(qvit.bench.run, "compare", compare)
    monkeypatch.setattr(qvit.cli.bench, "device_of", lambda device: device)
    report = tmp_path / "report.json"
    done = cli("bench", frozen_file, "--engine", "cuda", "--batch", "1,256", "--floats", "--json", report)
    assert (done.status, done.err) == (0, "")
    assert "deit, W4A4 in most layers (mixed) on Some GPU" in done.out
    lines = {name: line.split() for line in done.out.splitlines() for name in ("qvit cuda", "bf16", "int8") if name in line}
    assert lines["qvit cuda"][:2] == ["256", "uint8"]
    assert "2.50" in lines["bf16"]
    assert lines["bf16"][0] == lines["int8"][0] == "bfloat16"
    assert lines["int8"][-6:-4] == ["700", "MB"]
    assert [row.get("peer") for row in json.loads(report.read_text())["rows"]] == [None, "compile", "torchao"]


def test_no_gpu(cli: Cli, frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(qvit.bench.run, "compare", lambda *_: pytest.fail("nothing can be measured"))
    cli("bench", frozen_file, "--engine", "cuda").refused("There is no device 'cuda' here")
    cli("bench", frozen_file, "--device", "cuda", "--vs", "none").refused("There is no device 'cuda' here")


def test_mistakes(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    cli("bench", frozen_file, "--vs", "tvm").refused("no peer 'tvm' to compare with: use some of openvino")
    cli("bench", frozen_file, "--vs", "compile").refused("compile does not run on the CPU")
    cli("bench", frozen_file, "--floats").refused("--floats is for an engine on a GPU")
    cli("bench", frozen_file, "--engine", "cuda", "--device", "cpu").refused("'cuda' does not run on the device 'cpu'")
    cli("bench", frozen_file, "--engine", "cuda", "--threads", 2).refused("--threads is for engines on the CPU")
    cli("bench", frozen_file, "--engine", "cuda", "--vs", "openvino").refused("openvino does not run on a GPU")
    cli("bench", frozen_file, "--engine", "cpu", "--device", "cuda").refused("'cpu' does not run on the device 'cuda'")
    cli("bench", frozen_file, "--device", "cuda:77").refused("no device 'cuda:77'")
    cli("bench", frozen_file, "--batch", "one").refused("--batch 'one' is no list of whole numbers")
    cli("bench", frozen_file, "--batch", "0").refused("--batch 0 is out of range")
    cli("bench", frozen_file, "--threads", "").refused("--threads '' is no list")
    cli("bench", frozen_file, "--rounds", 0).refused("--rounds 0 is out of range")
    cli("bench", tmp_path / "none.qvit", "--vs", "none").refused("No such file")
    cli("bench", frozen_file, "--engine", "warp", "--vs", "none").refused("engine warp cannot be measured", "no engine 'warp'")
    cli("bench", "no_such_model", "--vs", "none").refused("cannot be made with 4 bits: timm has no model 'no_such_model'")
    cli("bench", frozen_file, "--vs", "none", "--bits", 4).refused("is quantized already: leave out --bits")
    cli("bench", frozen_file, "--vs", "none", "--residual", "float16").refused("leave out --bits and --residual")
    wrong = ("bench", "deit_tiny_patch16_224", "--vs", "none", "--residual", "half")
    cli(*wrong).refused("residual='half' is unknown: use float32 or float16")
    frozen_file.write_bytes(frozen_file.read_bytes()[:300])
    cli("bench", frozen_file, "--vs", "none").refused("truncated or damaged")
