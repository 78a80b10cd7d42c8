"""ONNX Runtime runs the model that it was given, with fused attention and int8 products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore")
def test_same_function(check_peer: Callable[..., None], tmp_path: Path) -> None:
    check_peer("onnxruntime", 0.95)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    import onnx

    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"Attention", "MatMulInteger", "BiasGelu"} <= kinds or {"QAttention", "MatMulInteger"} <= kinds, kinds
