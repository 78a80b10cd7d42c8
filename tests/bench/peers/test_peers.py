"""The table of peers, and what all of them promise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qvit.bench.peers import PEERS, USUAL_PEERS, missing_packages, peer_named, peers_on
from qvit.errors import InputError


def test_names() -> None:
    assert {"openvino", "onnxruntime", "torch"} <= set(PEERS)
    assert all(peer_named(name).name == name for name in PEERS)
    with pytest.raises(InputError, match="no peer 'tvm' to compare with: use some of openvino, "):
        peer_named("tvm")


def test_peers_of_another_device_are_refused() -> None:
    for device, names in USUAL_PEERS.items():
        assert [peer.name for peer in peers_on(device)] == list(names)
    assert peers_on("cuda", []) == []
    assert [peer.name for peer in peers_on("cuda", ["eager", "compile", "eager"])] == ["eager", "compile"]
    with pytest.raises(InputError, match="openvino does not run on a GPU, as the engine does: use some of eager, tf32, "):
        peers_on("cuda", ["compile", "openvino"])
    with pytest.raises(InputError, match="compile does not run on the CPU, as the engine does: use some of openvino, "):
        peers_on("cpu", ["compile"])


def test_missing_packages_are_found_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = PEERS["torch-bf16"]
    assert missing_packages(peer) == []
    monkeypatch.setattr(type(peer), "packages", ("torch", "absent_one", "absent_two"))
    assert missing_packages(peer) == ["absent_one", "absent_two"]


def test_the_table_imports_no_peer() -> None:
    code = "import sys, qvit.bench.peers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "openvino", "onnxruntime", "onnx", "nncf", "torchao"} & set(done.stdout.split())
