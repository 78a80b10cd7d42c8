"""Agreement: counts of equal codes, logits and top-1, over any number of batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qvit
from qvit.analyze.agreement import Agreement, agreement
from qvit.engines.reference import ReferenceEngine
from qvit.errors import InputError, UnsupportedModelError

Factory = Callable[..., Any]


class Disturbed:
    """An engine with known mistakes."""

    def __init__(self, engine: ReferenceEngine, wrong: dict[str, int], shift: float = 0.0, wrong_images: int = 0) -> None:
        self.engine, self.wrong, self.shift, self.wrong_images = engine, wrong, shift, wrong_images

    def forward(self, images: torch.Tensor, codes: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        assert codes is not None
        logits = self.engine.forward(images, codes).clone()
        for name, count in self.wrong.items():
            codes[name].view(-1)[:count] += 1
        logits[0, 0] += self.shift
        for image in range(self.wrong_images):
            logits[image, logits[image].argmin()] = logits[image].max() + 1
        return logits


@pytest.fixture(scope="module")
def pair(make_student: Factory, small_vit: Factory) -> tuple[Any, ReferenceEngine]:
    torch.manual_seed(0)
    student = make_student(small_vit(img_size=32, embed_dim=24, depth=1))
    return student, ReferenceEngine(qvit.freeze(student))


def _batches(*sizes: int) -> list[torch.Tensor]:
    return [torch.randn(size, 3, 32, 32).clamp(-2, 2) for size in sizes]


def test_a_model_agrees_with_itself(pair: tuple[Any, ReferenceEngine]) -> None:
    measured = agreement(*pair, _batches(2, 1))
    assert (measured.top1, measured.logits, measured.images) == (100.0, 0.0, 3)
    assert set(measured.codes.values()) == {100.0}
    assert len(measured.codes) == 1 + 8 + 1
    assert measured.holds


def test_wrong_codes_are_counted_over_all_batches(pair: tuple[Any, ReferenceEngine]) -> None:
    student, engine = pair
    tokens, width = 5, 24
    measured = agreement(student, Disturbed(engine, {"blocks.0.attn.proj.input": 3, "head.input": 1}), _batches(2, 2, 1))
    values = 5 * tokens * width
    assert measured.codes["blocks.0.attn.proj.input"] == pytest.approx(100 * (values - 9) / values)
    assert measured.codes["head.input"] == pytest.approx(100 * (5 * width - 3) / (5 * width))
    assert measured.worst_point == "head.input"
    assert measured.worst_codes == measured.codes["head.input"]
    assert not measured.holds


def test_logits_are_measured_in_their_spread(pair: tuple[Any, ReferenceEngine]) -> None:
    student, engine = pair
    batches = _batches(2, 3)
    with torch.no_grad():
        logits = torch.cat([student(x) for x in batches])
    measured = agreement(student, Disturbed(engine, {}, shift=1e-3), batches)
    assert measured.logits == pytest.approx(1e-3 / float(logits.double().std(correction=0)), rel=1e-3)
    assert measured.holds
    assert agreement(student, Disturbed(engine, {}, shift=math.nan), batches).logits == math.inf


def test_top1_is_a_share_of_images(pair: tuple[Any, ReferenceEngine]) -> None:
    student, engine = pair
    measured = agreement(student, Disturbed(engine, {}, wrong_images=1), _batches(2, 2))
    assert measured.top1 == 50.0
    assert not measured.holds


def test_batches_of_a_loader_and_the_mode_of_the_student(pair: tuple[Any, ReferenceEngine]) -> None:
    student, engine = pair
    student.train()
    try:
        measured = agreement(student, engine, [(x, torch.zeros(len(x))) for x in _batches(2)])
        assert student.training
    finally:
        student.eval()
    assert measured.images == 2


def test_no_images(pair: tuple[Any, ReferenceEngine]) -> None:
    with pytest.raises(InputError, match="no images"):
        agreement(*pair, [])


def test_another_model_is_refused(pair: tuple[Any, ReferenceEngine], make_student: Factory, small_vit: Factory) -> None:
    deeper = make_student(small_vit(img_size=32, embed_dim=24, depth=2))
    with pytest.raises(UnsupportedModelError, match=r"point blocks\.1\."):
        agreement(deeper, pair[1], _batches(1))
    wider = make_student(small_vit(img_size=32, embed_dim=48, depth=1))
    with pytest.raises(UnsupportedModelError, match="shapes at"):
        agreement(wider, pair[1], _batches(1))


def test_thresholds_and_row() -> None:
    kept = Agreement({"a": 99.9, "b": 100.0}, top1=99.5, logits=1e-2, images=200)
    assert kept.holds
    assert kept.to_row() == {"agreement": 99.5, "codes_agreement": 99.9, "worst_point": "a", "logits_difference": 1e-2}
    assert not Agreement({"a": 99.89}, 100, 0, 1).holds
    assert not Agreement({"a": 100}, 99.4, 0, 1).holds
    assert not Agreement({"a": 100}, 100, 0.011, 1).holds


def test_what_rounding_changed_is_said_and_no_part_of_the_contract(pair: tuple[Any, ReferenceEngine]) -> None:
    student, engine = pair

    class Trained(torch.nn.Module):
        """The student before it was rounded, as if that had changed the answer to the first image of every batch."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = student(images).clone()
            logits[0, logits[0].argmin()] = logits[0].max() + 1
            return logits

    batches = _batches(2, 2, 1)
    measured = agreement(student, engine, batches, Trained())
    assert (measured.trained_top1, measured.top1, measured.holds) == (40.0, 100.0, True)
    assert measured.to_row()["agreement_before_rounding"] == 40.0
    assert agreement(student, engine, batches, student).trained_top1 == 100.0
    assert "agreement_before_rounding" not in agreement(student, engine, batches).to_row()
