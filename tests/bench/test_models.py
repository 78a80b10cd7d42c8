"""What is measured: random integers of the right kind, and the float model of their architecture."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import qvit
from qvit.bench.models import float_model, write_random_model
from qvit.errors import QvitError
from qvit.families import swin, vit


def test_random_integers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Noise needs no careful search. (`qvit.calibration.calibrate` is the function; its module has the same name.)
    monkeypatch.setattr(importlib.import_module("qvit.calibration.calibrate"), "_VALUES_PER_POINT", 1 << 12)
    path = tmp_path / "model.qvit"
    write_random_model("vit_tiny_patch16_224", 3, path, {"blocks.0.mlp.fc1.weight": 4})
    runner = qvit.load(path)
    assert runner.model.block_bits() == (3, 3)
    assert runner.model.blocks[0].attention.rectify_q is not None
    assert [layer.weight.spec.bits for layer in runner.model.linears()[:2]] == [8, 3]
    assert [block.fc1.weight.spec.bits for block in runner.model.blocks[:2]] == [4, 3]
    logits = np.asarray(runner(np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8)))
    assert logits.shape == (1, 1000)
    assert logits.std() > 0
    # The codes are spread over their range, as a trained model's are.
    codes = runner.model.blocks[5].fc1.weight.codes()
    assert set(np.unique(codes)) == set(range(-4, 4))


def test_what_cannot_be_made(tmp_path: Path) -> None:
    for name, bits in (("swinv2_tiny_window8_256", 4), ("no_such_model", 4), ("vit_tiny_patch16_224", 1)):
        with pytest.raises(QvitError):
            write_random_model(name, bits, tmp_path / "model.qvit")
    assert list(tmp_path.iterdir()) == []


def test_float_models_have_the_architecture() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=7, img_size=32)
    built = float_model(vit.describe(model))
    assert vit.describe(built) == vit.describe(model)
    assert not built.training
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert built(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_float_swins_have_the_architecture(small_swin: Callable[..., Any]) -> None:
    model = small_swin()
    built = float_model(swin.describe(model))
    assert swin.describe(built) == swin.describe(model)
    assert built(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
