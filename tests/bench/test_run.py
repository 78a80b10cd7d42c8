"""The whole comparison: what is made, what is started, what is left out and what the rows say. Processes are played here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import qvit.bench.run
from qvit.bench.child import ChildError
from qvit.bench.peers import PEERS
from qvit.bench.run import Settings, compare, make_random_model
from qvit.errors import InputError, MissingDependencyError

MILLISECONDS = {"cpu": 2.0, "openvino": 3.0, "openvino-bf16": 5.0, "onnxruntime": 4.0}
ON_GPU = {"cuda": 1.0, "eager": 9.0, "compile": 3.0, "torchao": 4.0}


class Played:
    """A child process that answers at once; fails where `broken` says."""

    made: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    open = 0
    broken: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, module: str, request: dict[str, Any], environment: Any = None) -> None:
        self.name = request.get("peer") or request.get("engine") or "random"
        kind = module.rpartition(".")[2]
        Played.made.append((kind, request))
        if (kind, self.name) in Played.broken:
            raise ChildError("it is broken")
        if kind == "prepare":
            (Path(request["path"]) / "model").write_bytes(bytes(1000))
        elif "device" in request:
            assert not environment
            assert "threads" not in request
        else:
            assert environment["OMP_NUM_THREADS"] == str(request["threads"])
        self.request, self.turns = request, 0
        self.start_seconds = 1.0 + len(Played.made) / 100
        Played.open += 1

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self.turns += 1
        if ("turn", self.name) in Played.broken and self.turns == 2:
            raise ChildError("it is broken")
        reply = {"peak_mb": 50.0, "now_mb": 40.0}
        if "device" not in self.request:
            return {"ms": [MILLISECONDS[self.name]] * order["calls"], **reply}
        slower = {"float32": 2.0, "uint8": 1.0}[self.request["input"]] if self.name == "cuda" else 1.0
        if "other" in self.request["path"]:
            slower *= 3
        return {"ms": [slower * ON_GPU[self.name]] * order["calls"], **reply, "gpu_mb": 700.0, "device": "Some GPU"}

    def close(self) -> None:
        Played.open -= 1

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def progress(items: Iterable[Any], _total: int, _what: str) -> Iterator[Any]:
    yield from items


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qvit.bench.run, "Child", Played)
    monkeypatch.setattr(qvit.bench.run, "missing_packages", lambda peer: [])
    Played.made, Played.open, Played.broken = [], 0, set()


def run(frozen_file: Path, tmp_path: Path, names: list[str], **settings: Any) -> tuple[list[dict[str, Any]], list[str]]:
    notes: list[str] = []
    folder = tmp_path / "peers"
    folder.mkdir()
    options = Settings("cpu", **{"rounds": 4, "starts": 2, **settings})
    rows = compare(frozen_file, [PEERS[name] for name in names], options, folder, progress, notes.append)
    assert Played.open == 0
    return rows, notes


def test_rows(frozen_file: Path, tmp_path: Path) -> None:
    rows, notes = run(frozen_file, tmp_path, ["openvino", "onnxruntime"], batches=(1, 8), threads=(1, 2))
    assert notes == []
    assert [(row["batch"], row["threads"], row.get("peer")) for row in rows] == [
        (batch, threads, peer) for batch in (1, 8) for threads in (1, 2) for peer in (None, "openvino", "onnxruntime")
    ]
    own, peer = rows[6], rows[7]
    assert (own["engine"], own["model"], own["ms_median"], own["images_per_s"]) == ("cpu", "vit_tiny_patch16_224", 2.0, 4000.0)
    assert (own["file_bytes"], own["rss_mb"], own["calls"]) == (frozen_file.stat().st_size, 50.0, 12)
    assert "ratio_to_peer" not in own
    assert "engine" not in peer
    assert (peer["ratio_to_peer"], peer["ratio_p10"], peer["ratio_p90"], peer["file_bytes"]) == (1.5, 1.5, 1.5, 1000)
    served = [request for kind, request in Played.made if kind == "worker"]
    assert len(served) == 2 * len(rows)  # two starts each
    assert {tuple(request["shape"]) for request in served} == {(1, 1, 8, 8), (8, 1, 8, 8)}


def test_a_model_is_made_once_for_a_batch_size_and_shared(frozen_file: Path, tmp_path: Path) -> None:
    rows, _ = run(frozen_file, tmp_path, ["openvino", "openvino-bf16"], batches=(1, 8), threads=(1, 2))
    prepared = [(request["peer"], request["batch"]) for kind, request in Played.made if kind == "prepare"]
    assert prepared == [("openvino", 1), ("openvino", 8)]
    assert sum(row.get("peer") == "openvino-bf16" for row in rows) == 4


def test_what_starts_slowly_is_started_once(frozen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qvit.bench.run, "_SLOW_START", 0.5)
    run(frozen_file, tmp_path, [], starts=3)
    assert [kind for kind, _ in Played.made] == ["worker"]


def test_a_peer_that_is_not_installed_is_left_out(frozen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        qvit.bench.run, "missing_packages", lambda peer: ["nncf", "openvino"] if peer.name == "openvino" else []
    )
    rows, notes = run(frozen_file, tmp_path, ["openvino", "onnxruntime"])
    assert notes == ["openvino is left out, since nncf and openvino are not installed: pip install 'qvit[bench]'."]
    assert [row.get("peer") for row in rows] == [None, "onnxruntime"]


def test_a_peer_that_fails_is_left_out(frozen_file: Path, tmp_path: Path) -> None:
    Played.broken = {("prepare", "openvino"), ("worker", "onnxruntime")}
    rows, notes = run(frozen_file, tmp_path, ["openvino", "openvino-bf16", "onnxruntime"])
    assert notes == [
        "openvino is left out, since its model cannot be made: it is broken",
        "onnxruntime is left out at batch 1, 1 thread: it is broken",
    ]
    assert [row.get("peer") for row in rows] == [None]


def test_what_fails_while_it_is_measured_is_left_out(frozen_file: Path, tmp_path: Path) -> None:
    Played.broken = {("turn", "openvino")}
    rows, notes = run(frozen_file, tmp_path, ["openvino", "onnxruntime"])
    assert notes == ["openvino is left out at batch 1, 1 thread: it is broken"]
    assert [row.get("peer") for row in rows] == [None, "onnxruntime"]
    assert rows[1]["ratio_to_peer"] == 2.0
    Played.broken = {("turn", "cpu")}
    with pytest.raises(InputError, match="engine cpu cannot be measured at batch 1, 1 thread: it is broken"):
        compare(frozen_file, [], Settings("cpu", rounds=4), tmp_path, progress, notes.append)
    assert Played.open == 0


def on_gpu(files: list[Path], tmp_path: Path, names: list[str], **settings: Any) -> tuple[list[dict[str, Any]], list[str]]:
    notes: list[str] = []
    folder = tmp_path / "peers"
    folder.mkdir()
    options = Settings("cuda", device="cuda", **{"rounds": 4, "starts": 1, **settings})
    rows = compare(files, [PEERS[name] for name in names], options, folder, progress, notes.append)
    assert Played.open == 0
    return rows, notes


def test_rows_of_a_gpu(frozen_file: Path, tmp_path: Path) -> None:
    rows, notes = on_gpu([frozen_file], tmp_path, ["eager", "compile"], batches=(1, 256), threads=(1, 2), float_images=True)
    assert notes == []
    assert [(row["batch"], row.get("peer"), row["input"]) for row in rows] == [
        (batch, *kind)
        for batch in (1, 256)
        for kind in ((None, "uint8"), (None, "float32"), ("eager", "float32"), ("compile", "bfloat16"))
    ]
    assert all((row["device"], row["gpu_mb"], "threads" in row) == ("Some GPU", 700.0, False) for row in rows)
    assert [row["ms_median"] for row in rows[:4]] == [1.0, 2.0, 9.0, 3.0]
    assert [row.get("ratio_to_peer") for row in rows[:4]] == [None, None, 9.0, 3.0]  # to uint8 images
    prepared = [(request["peer"], Path(request["path"]).name) for kind, request in Played.made if kind == "prepare"]
    assert prepared == [("eager", "torch-float32"), ("compile", "torch-bfloat16")]  # once for both batch sizes


def test_files_take_turns_with_the_same_peers(frozen_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qvit"
    other.write_bytes(frozen_file.read_bytes())
    rows, _ = on_gpu([frozen_file, other], tmp_path, ["compile"])
    assert [(row.get("peer"), row["ms_median"], row.get("ratio_to_peer")) for row in rows] == [
        (None, 1.0, None),
        ("compile", 3.0, 3.0),
        (None, 3.0, None),
        ("compile", 3.0, 1.0),
    ]
    assert [request["peer"] for kind, request in Played.made if kind == "worker"] == [None, None, "compile"]


def test_a_file_that_fails_is_left_out_where_others_are_left(
    frozen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.qvit"
    other.write_bytes(frozen_file.read_bytes())
    ask = Played.ask

    def fail(self: Played, order: dict[str, Any]) -> dict[str, Any]:
        if "other" in self.request["path"]:
            raise ChildError("out of memory")
        return ask(self, order)

    monkeypatch.setattr(Played, "ask", fail)
    rows, notes = on_gpu([other, frozen_file], tmp_path, ["compile"])
    assert notes == ["The engine cuda is left out at batch 1 with other.qvit and uint8 images: out of memory"]
    assert [(row.get("peer"), row["ms_median"]) for row in rows] == [(None, 1.0), ("compile", 3.0)]
    with pytest.raises(InputError, match="The engine cuda cannot be measured at batch 1: out of memory"):
        compare([other], [], Settings("cuda", device="cuda", rounds=1), tmp_path, progress, notes.append)


def test_an_engine_that_fails_is_an_error(frozen_file: Path, tmp_path: Path) -> None:
    Played.broken = {("worker", "cpu")}
    with pytest.raises(InputError, match="engine cpu cannot be measured at batch 1, 1 thread: it is broken"):
        run(frozen_file, tmp_path, ["openvino"])
    assert Played.open == 0


def test_a_random_model_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Played.broken = {("prepare", "random")}
    with pytest.raises(InputError, match="swin cannot be made with 4 bits: it is broken"):
        make_random_model("swin", 4, tmp_path / "model.qvit")
    monkeypatch.setattr(qvit.bench.run, "is_installed", lambda name: name != "timm")
    with pytest.raises(MissingDependencyError, match=r"needs timm: pip install 'qvit\[train\]'"):
        make_random_model("swin", 4, tmp_path / "model.qvit")
