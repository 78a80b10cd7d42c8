"""Sensitivities: what they measure, that the model is left alone, and files of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import qvit
from qvit.analyze.unit_sensitivity import WIDTHS, Sensitivities, measure_sensitivities
from qvit.errors import InputError, UnsupportedModelError
from qvit.layers.points import float_mode, quantization_points
from qvit.spec import ModelSpec

OPTIONS: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def model(small_vit: Callable[..., Any]) -> Any:
    torch.manual_seed(3)
    return small_vit("vit_tiny_patch16_224", **OPTIONS)


@pytest.fixture(scope="module")
def images(model: Any) -> torch.Tensor:
    return torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.fixture(scope="module")
def measured(model: Any, images: torch.Tensor) -> Sensitivities:
    return measure_sensitivities(model, [images[:10], (images[10:], None)], images=20)


def test_a_damage_is_that_of_one_unit_alone(model: Any, images: torch.Tensor, measured: Sensitivities) -> None:
    student = qvit.quantize(model, bits=3).eval()
    qvit.calibrate(student, [images[:20]], images=20)
    points = quantization_points(student)
    with torch.no_grad(), float_mode(student):
        reference = student(images[:20])
        for unit, names in (
            ("blocks.1.attn.attention", [f"blocks.1.attn.{part}" for part in ("q", "k", "v", "map")]),
            ("blocks.0.mlp.fc2", ["blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.input"]),
        ):
            for name in names:
                points[name].enabled = True
            logits = student(images[:20])
            for name in names:
                points[name].enabled = False
            expected = F.kl_div(logits.log_softmax(-1), reference.softmax(-1), reduction="batchmean").item()
            assert expected > 0
            assert measured.damages[unit][3] == pytest.approx(expected, rel=1e-3)


def test_all_units_at_all_widths(measured: Sensitivities) -> None:
    assert measured.widths == WIDTHS
    assert measured.images == 20
    assert len(measured.damages) == 2 * 5
    assert measured.spec == {"rectify": True, "equalise": True, "weight_quantizer": "lsq"}
    for damages in measured.damages.values():
        # Two bits more are a sixteenth of the error; no unit is exempt from that as a whole.
        assert damages[2] > damages[4] > damages[8] >= 0
    assert sum(damages[8] for damages in measured.damages.values()) < sum(d[2] for d in measured.damages.values()) / 100


def test_the_model_is_left_alone(model: Any, images: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shown = []

    def track(items: Any, total: int) -> Any:
        shown.append(total)
        return items

    found = measure_sensitivities(model, [images], ModelSpec(rectify=False), widths=(5, 3), images=4, track=track)
    assert shown == [2 * 10]
    assert (found.widths, found.images, found.spec["rectify"]) == ((3, 5), 4, False)
    assert not hasattr(model, "qvit")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mistakes(model: Any, images: torch.Tensor) -> None:
    for widths in ((), (2, 2)):
        with pytest.raises(InputError, match="not distinct candidates"):
            measure_sensitivities(model, [images], widths=widths)
    with pytest.raises(InputError, match="no images"):
        measure_sensitivities(model, [])
    with pytest.raises(InputError, match=r"image batches \[B, 1, 8, 8\]"):
        measure_sensitivities(model, [images[:, :, :4]])
    with pytest.raises(UnsupportedModelError):
        measure_sensitivities(torch.nn.Linear(3, 3), [images])


def test_a_file_of_them(measured: Sensitivities, tmp_path: Path) -> None:
    path = tmp_path / "sensitivities.json"
    measured.save(path, ["x"])
    assert Sensitivities.load(path) == measured
    report = json.loads(path.read_text())
    assert (report["schema"], report["command"]) == (1, ["x"])
    assert {"unit", "bits", "damage", "model", "images"} <= report["rows"][0].keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows.clear(), "holds no sensitivities"),
        (lambda rows: rows[0].pop("damage"), "holds no sensitivities"),
        (lambda rows: rows[0].update(damage="much"), "holds no sensitivities"),
        (lambda rows: rows[0].update(bits=1), "holds no sensitivities"),
        (lambda rows: rows[0].pop("rectify"), "holds no sensitivities"),
        (lambda rows: rows.pop(), "lacks a width of blocks.1.mlp.fc2"),
    ],
)
def test_a_damaged_file(
    measured: Sensitivities, tmp_path: Path, damage: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    path = tmp_path / "sensitivities.json"
    measured.save(path)
    report = json.loads(path.read_text())
    damage(report["rows"])
    path.write_text(json.dumps(report))
    with pytest.raises(InputError, match=message):
        Sensitivities.load(path)
