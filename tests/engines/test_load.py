"""`qvit.load`: a file becomes something that classifies images, and bad input is refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.errors import FileFormatError, InputError
from qvit.integer.model import IntegerModel


@pytest.fixture
def runner(frozen_file: Path) -> Any:
    return qvit.load(frozen_file)


def _pixels(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


def test_arrays_in_arrays_out_tensors_in_tensors_out(runner: Any) -> None:
    pixels = _pixels()
    floats = runner.model.preprocessing.normalise(pixels)
    logits = runner(pixels)
    assert isinstance(logits, np.ndarray)
    assert (logits.dtype, logits.shape) == (np.float32, (3, 10))
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    # Pixels, normalised floats of two widths and tensors are one and the same input.
    assert (runner(floats) == logits).all()
    assert (runner(floats.astype(np.float64)) == logits).all()
    from_tensor = runner(torch.from_numpy(floats))
    assert isinstance(from_tensor, torch.Tensor)
    assert (from_tensor.numpy() == logits).all()
    assert (runner(torch.from_numpy(pixels)).numpy() == logits).all()


def test_batches_do_not_matter(runner: Any) -> None:
    pixels = _pixels(5)
    apart = np.concatenate([runner(pixels[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(apart, runner(pixels), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_no_logits(runner: Any) -> None:
    assert runner(_pixels(0)).shape == (0, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.uint8), r"takes images \[B, 1, 8, 8\], not \[1, 3, 8, 8\]"),
        (np.zeros((1, 1, 9, 8), np.uint8), "not"),
        (np.zeros((1, 8, 8), np.uint8), r"not \[1, 8, 8\]"),
        (np.zeros((1, 1, 8, 8), np.int32), "uint8 pixels or normalised floats, not int32"),
        (np.full((1, 1, 8, 8), np.nan, np.float32), "not finite"),
        (np.full((1, 1, 8, 8), np.inf, np.float32), "not finite"),
    ],
)
def test_other_images_are_refused(runner: Any, images: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner(images)


def test_other_engines_and_files_are_refused(frozen_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no engine 'warp': use one of cpu, reference"):
        qvit.load(frozen_file, engine="warp")
    with pytest.raises(InputError, match="No such file"):
        qvit.load(tmp_path / "none.qvit")
    frozen_file.write_bytes(frozen_file.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="truncated or damaged"):
        qvit.load(frozen_file)


def test_a_loaded_model_computes_what_the_frozen_one_does(frozen: IntegerModel, runner: Any) -> None:
    from qvit.engines import create_engine

    images = frozen.preprocessing.normalise(_pixels())
    assert (create_engine(frozen).run(images) == runner(images)).all()
