"""The pass over the images: every statistic against what a plain computation on all images at once gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import qvit
from qvit.analyze.attention_statistics import Subject, class_token_maps, measure
from qvit.analyze.entropy import code_entropy
from qvit.analyze.trace import BlockTrace, tracer_of
from qvit.convert import family_of, preprocessing_of
from qvit.distill import tap_queries_keys
from qvit.errors import InputError
from qvit.layers.points import record_codes
from qvit.preprocessing import Preprocessing

SIZES: dict[str, Any] = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 2}


@pytest.fixture(scope="module")
def models(small_vit: Callable[..., nn.Module], perturb: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """A float teacher and a calibrated 2-bit student of it."""
    torch.manual_seed(0)
    teacher = small_vit(**SIZES)
    student = qvit.quantize(teacher, bits=2)
    qvit.calibrate(student, [torch.rand(8, 3, 8, 12) - 0.4], images=8)
    return {"teacher": teacher, "student": perturb(student).eval()}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 3, 8, 12), dtype=np.uint8)


def _subjects(models: dict[str, Any]) -> dict[str, Subject]:
    return {
        role: Subject(
            role,
            tracer_of(model),
            preprocessing_of(models["teacher"]),
            family_of(models["teacher"]).describe(models["teacher"]),
        )
        for role, model in models.items()
    }


def test_all_statistics(models: dict[str, Any], pixels: np.ndarray) -> None:
    subjects = _subjects(models)
    measured = measure(subjects, [pixels[:3], pixels[3:]], "teacher")
    for subject in subjects.values():
        subject.tracer.close()
    images = torch.from_numpy(subjects["student"].preprocessing.normalise(pixels))
    taps = {}
    for role, model in models.items():
        with torch.no_grad(), tap_queries_keys(model) as tapped, record_codes(model) as codes:
            model(images)
            taps[role] = tapped.collect()
    assert measured["teacher"].similarity is None
    own = measured["student"]
    assert own.similarity is not None
    for block in range(2):
        for index, name in enumerate(("q", "k")):
            s, t = (taps[role][block][index].double() for role in ("student", "teacher"))
            gram = [x @ x.transpose(-2, -1) for x in (s, t)]
            unit = [g / g.square().sum((-2, -1), keepdim=True).sqrt() for g in gram]
            distance = (unit[0] - unit[1]).square().sum((-2, -1)).sqrt().mean(0)
            np.testing.assert_allclose(own.similarity[name][block], distance.numpy(), rtol=1e-3)

            d = own.distributions[block][name]
            code = codes[f"blocks.{block}.attn.{name}"].numpy()
            assert d.codes is not None
            assert d.codes.entropies == pytest.approx([code_entropy(code[:, head]) for head in range(3)])
            assert d.after is not None
            assert d.after.mean == pytest.approx(float(s.mean()), abs=1e-6)
            assert d.after.std == pytest.approx(float(s.std(unbiased=False)), rel=1e-5)
            assert d.before.values == s.numel()
            # Before IRM the codes are of the same number and range.
            assert d.codes_before is not None
            assert d.codes_before.counts.sum() == code.size
            assert 0 < d.codes_before.entropy <= 2
            teacher = measured["teacher"].distributions[block][name]
            assert teacher.before.std == pytest.approx(float(t.std(unbiased=False)), rel=1e-5)
            assert (teacher.after, teacher.codes, teacher.codes_before) == (None, None, None)
    # Two rows of three patches, 4 pixels apart: the mean over all pairs.
    step, diagonal = 4.0, 4 * 2**0.5
    pairs = 14 * step + 4 * 8 + 8 * diagonal + 4 * np.hypot(8, 4)
    assert own.uniform == pytest.approx(pairs / 36)
    assert own.distance is not None
    assert own.distance.shape == (2, 3)
    assert (own.distance > 0).all()
    assert (own.distance < np.hypot(8, 4)).all()


def test_the_share_of_empty_rows(models: dict[str, Any], pixels: np.ndarray) -> None:
    """A traced map in which one of the six rows of patches is zero, in one of three heads and one of two blocks."""
    subject = _subjects(models)["teacher"]
    traces = subject.run(pixels)
    subject.tracer.close()

    class Emptied:
        def __call__(self, images: torch.Tensor) -> list[BlockTrace]:
            attention = traces[0].attention
            assert attention is not None
            attention[:, 1, 3] = 0
            return traces

        def close(self) -> None: ...

    emptied = Subject("teacher", Emptied(), subject.preprocessing, subject.architecture)
    assert measure({"student": emptied}, [pixels], "teacher")["student"].skipped == pytest.approx(1 / 36)


def test_without_a_grid_there_is_no_distance(models: dict[str, Any], pixels: np.ndarray) -> None:
    known = _subjects({"teacher": models["teacher"]})["teacher"]
    subject = Subject("windows", known.tracer, known.preprocessing, architecture=object())
    measured = measure({"student": subject}, [pixels], "teacher")["student"]
    assert (measured.distance, measured.uniform, measured.similarity) == (None, None, None)
    assert len(measured.distributions) == 2
    assert class_token_maps(subject, pixels) is None
    known.tracer.close()


def test_windows_have_distributions_and_similarities_only() -> None:
    """A Swin Transformer: heads differ from stage to stage, and the batch of q and k counts windows."""
    swin: Any = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2), num_classes=5
    ).eval()
    noisy = copy.deepcopy(swin)
    noisy.layers[1].blocks[0].attn.qkv.weight.data.mul_(-1.5)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    subjects = {
        role: Subject(role, tracer_of(model), Preprocessing((3, 32, 32)), architecture=None)
        for role, model in (("teacher", swin), ("student", noisy))
    }
    measured = measure(subjects, [pixels[:1], pixels[1:]], "teacher")["student"]
    assert measured.distance is None
    assert [d["q"].before.values for d in measured.distributions] == [3 * 64 * 8, 3 * 16 * 16, 3 * 16 * 16]
    assert measured.similarity is not None
    assert [len(heads) for heads in measured.similarity["q"]] == [1, 2, 2]
    assert measured.similarity["q"][0] == pytest.approx(0, abs=1e-3)
    # The sign and size of the weights do not change similarities; what follows from them in the next block does.
    assert measured.similarity["q"][1] == pytest.approx(0, abs=1e-3)
    assert (measured.similarity["q"][2] > 1e-2).all()
    assert (measured.similarity["q"][2] < 2**0.5).all()


def test_teachers_of_another_shape_are_not_compared(
    models: dict[str, Any], small_vit: Callable[..., nn.Module], pixels: np.ndarray
) -> None:
    other = small_vit(**(SIZES | {"depth": 1}))
    subjects = _subjects({"teacher": models["teacher"], "student": models["student"]})
    architecture = family_of(other).describe(other)
    subjects["teacher"] = Subject("teacher", tracer_of(other), preprocessing_of(other), architecture)
    measured = measure(subjects, [pixels], "teacher")
    assert measured["student"].similarity is None
    assert len(measured["teacher"].distributions) == 1


def test_class_token_maps(models: dict[str, Any], pixels: np.ndarray, small_vit: Callable[..., nn.Module]) -> None:
    subject = _subjects({"teacher": models["teacher"]})["teacher"]
    maps = class_token_maps(subject, pixels[:2])
    assert maps is not None
    assert maps.shape == (2, 2, 2, 3)
    trace = subject.run(pixels[:2])[1]
    assert trace.attention is not None
    np.testing.assert_allclose(maps[1, 1].ravel(), trace.attention[1, :, 0, 1:].mean(0), rtol=1e-5)
    # What is missing to one goes to the class token itself.
    np.testing.assert_allclose(maps[1, 1].sum() + trace.attention[1, :, 0, 0].mean().item(), 1, rtol=1e-5)
    without = small_vit("vit_tiny_patch16_224", **SIZES, class_token=False, global_pool="avg")
    other = Subject("avg", tracer_of(without), preprocessing_of(without), family_of(without).describe(without))
    assert class_token_maps(other, pixels) is None


def test_no_images(models: dict[str, Any]) -> None:
    subjects = _subjects(models)
    with pytest.raises(InputError, match="no images"):
        measure(subjects, [], "teacher")
