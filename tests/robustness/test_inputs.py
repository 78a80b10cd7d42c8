"""Images of every kind: refused with a sentence, or classified as the same values in a plain array are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvit.engines import Runner
from qvit.errors import InputError, QvitError
from tests.robustness.budgets import examples

NAMES = ["w4a4", "w2a2", "w3a8", "distilled", "average"]


@examples(80)
@given(
    images=hnp.arrays(
        dtype=st.one_of(
            hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(), hnp.complex_number_dtypes(),
            hnp.boolean_dtypes(), hnp.byte_string_dtypes(max_len=3), hnp.datetime64_dtypes(),
        ),
        shape=hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=3),
    ),
    name=st.sampled_from(NAMES),
)  # fmt: skip
def test_arrays_of_other_shapes(runners: dict[str, Runner], images: np.ndarray, name: str) -> None:
    with pytest.raises(InputError) as caught:
        runners[name](images)
    assert "\n" not in str(caught.value)


@examples(40)
@given(
    dtype=st.sampled_from("?bBhHiIlLqQefdgFDSUOmM"), order=st.sampled_from("<>"), data=st.data(), name=st.sampled_from(NAMES)
)
def test_arrays_of_every_type(runners: dict[str, Runner], dtype: str, order: str, data: st.DataObject, name: str) -> None:
    values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2, (2, 3, 16, 16))
    images = values.astype(np.dtype(dtype).newbyteorder(order))
    expected = values.astype(np.uint8) if images.dtype == np.uint8 else values.astype(np.float32)
    if images.dtype.kind == "f" or images.dtype == np.uint8:
        assert np.array_equal(runners[name](images), runners[name](expected))
    else:
        with pytest.raises(InputError, match="uint8 pixels or normalised floats"):
            runners[name](images)


@examples(60)
@given(data=st.data(), name=st.sampled_from(NAMES), as_float=st.booleans())
def test_views_of_every_kind(runners: dict[str, Runner], data: st.DataObject, name: str, as_float: bool) -> None:
    """Strides of any sign and size, zero strides, views into the middle, read-only and Fortran order."""
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    whole = rng.integers(0, 256, (9, 8, 40, 50), dtype=np.uint8)
    if as_float:
        whole = (whole / 64 - 2).astype(np.float32)
    views: list[Any] = [
        whole[1:5, 2:5, 3:19, 7:23],
        whole[::2, ::3, ::-2, ::3][:4, :3, :16, :16],
        whole[8:4:-1, 6:0:-2, 39:7:-2, 49:1:-3],
        np.broadcast_to(whole[0, 0, :16, :16], (4, 3, 16, 16)),
        whole.transpose(1, 0, 3, 2)[:4, :3, :16, :16],
        np.asfortranarray(whole[:4, :3, :16, :16]),
        whole[:0, :3, :16, :16],
    ]
    view = data.draw(st.sampled_from(views))
    if data.draw(st.booleans()):
        view = view.view()
        view.flags.writeable = False
    before = view.copy()
    logits = runners[name](view)
    assert np.array_equal(logits, runners[name](np.ascontiguousarray(view)))
    assert np.array_equal(view, before)
    assert logits.shape == (len(view), 5)
    assert np.isfinite(logits).all()
    assert runners[name](plain).shape == (4, 5)


@examples(40)
@given(
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    place=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 15), st.integers(0, 15)),
    width=st.sampled_from([np.float16, np.float32, np.float64]),
    name=st.sampled_from(NAMES),
)
def test_values_that_are_not_finite(runners: dict[str, Runner], bad: float, place: Any, width: Any, name: str) -> None:
    images = np.zeros((3, 3, 16, 16), width)
    images[place] = bad
    with pytest.raises(InputError, match="not finite"):
        runners[name](images)
    images[place] = 0  # and the engine is none the worse for it
    assert np.isfinite(runners[name](images)).all()


@examples(40)
@given(scale=st.sampled_from([0.0, 1e-45, 1e-38, 1e-3, 1e3, 1e10, 1e30, 3.4e38]), name=st.sampled_from(NAMES))
def test_finite_values_however_large(runners: dict[str, Runner], scale: float, name: str) -> None:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (3, 3, 16, 16))
    logits = runners[name]((signs * scale).astype(np.float32))
    assert np.isfinite(logits).all()


def test_doubles_beyond_the_range_of_floats(runners: dict[str, Runner]) -> None:
    with pytest.raises(InputError, match="not finite"):
        runners["w4a4"](np.full((1, 3, 16, 16), 1e300))


def test_tensors(runners: dict[str, Runner], pixels: np.ndarray) -> None:
    runner = runners["w4a4"]
    floats = runner.model.preprocessing.normalise(pixels)
    expected = runner(floats)
    tensor = torch.from_numpy(floats)
    for other in (
        tensor.clone().requires_grad_(),
        tensor.contiguous(memory_format=torch.channels_last),
        torch.cat([tensor, tensor])[:3],
        tensor.flip(0).flip(0),
        tensor.double(),
    ):
        logits = runner(other)
        assert isinstance(logits, torch.Tensor)
        assert np.array_equal(logits.numpy(), expected)


@pytest.mark.parametrize("images", [None, 3, "cat.jpg", [[[[0]]]], {}, b"bytes"])
def test_what_is_no_array(runners: dict[str, Runner], images: Any) -> None:
    with pytest.raises(InputError):
        runners["w4a4"](images)


def test_subclasses_of_arrays(runners: dict[str, Runner], pixels: np.ndarray, tmp_path: Path) -> None:
    runner = runners["w4a4"]
    expected = runner(pixels)
    np.save(tmp_path / "pixels.npy", pixels)
    for images in (np.ma.masked_array(pixels), np.load(tmp_path / "pixels.npy", mmap_mode="r")):
        assert np.array_equal(np.asarray(runner(images)), expected)


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, "two", True, 1 << 70])
def test_numbers_of_threads(models: Any, threads: Any) -> None:
    from qvit.engines import create_engine

    with pytest.raises(QvitError, match="threads"):
        create_engine(models["w4a4"], "cpu", threads=threads)
