"""OpenVINO runs the model that it was given, in int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["openvino", "openvino-bf16"])
def test_same_function(check_peer: Callable[..., None], tmp_path: Path, name: str) -> None:
    check_peer(name, 0.95)
    assert {path.name for path in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    assert "FakeQuantize" in (tmp_path / "model.xml").read_text()
