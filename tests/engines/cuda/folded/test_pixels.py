"""Codes of pixels are what the reference engine makes of normalised ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.pixels import PixelConstants
from qvit.engines.reference import ReferenceEngine
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec

TO = Constants(torch.device("cpu"))
POINT = "patch_embed.proj.input"


@pytest.mark.parametrize(("changes", "narrower"), [({}, 1.0), ({"overrides": {POINT: {"bits": 5}}}, 0.5)])
def test_codes_of_all_pixels(changes: dict[str, object], narrower: float, freeze: Callable[..., IntegerModel]) -> None:
    """With pixels beyond the highest code, too."""
    model = freeze(spec=ModelSpec.of_bits(4, **changes))
    object.__setattr__(model.patch.input, "scale", model.patch.input.scale * np.float32(narrower))
    found = PixelConstants.of(model, TO)
    height, width = model.architecture.img_size
    pixels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 3, height, width).contiguous()
    wanted: dict[str, torch.Tensor] = {}
    images = torch.from_numpy(model.preprocessing.normalise(pixels.numpy()))
    ReferenceEngine(model).forward(images, wanted)
    codes = wanted[POINT].reshape(256, -1, 3, model.architecture.patch_features // 3)[:, 0, :, 0]
    assert torch.equal(found.codes.T.to(torch.int16), codes)
    assert found.identity == bool((codes == torch.arange(256)[:, None]).all())
    assert len(codes.unique()) > 16
    # Floats, as `src/pixels.cu` has them.
    floats = (images[:, :, 0, 0] * found.std - found.offset) / np.float32(found.step)
    assert torch.equal(floats.round().clamp(0, found.high).to(torch.int16), codes)


def test_pixels_that_are_their_own_codes(freeze: Callable[..., IntegerModel]) -> None:
    model = freeze(spec=ModelSpec.of_bits(4))
    quantizer, channels = model.patch.input, model.architecture.in_chans
    object.__setattr__(quantizer, "scale", np.array([1 / 255], np.float32))
    mean = np.asarray(model.preprocessing.mean, np.float32)
    assert quantizer.offset is not None
    object.__setattr__(quantizer, "offset", np.repeat(-mean, quantizer.offset.size // channels))
    assert PixelConstants.of(model, TO).identity
    object.__setattr__(quantizer, "scale", np.array([1.01 / 255], np.float32))
    assert not PixelConstants.of(model, TO).identity
