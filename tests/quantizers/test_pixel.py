"""The pixel quantizer gives back the pixels that an image was made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvit.layers.patch_embed import patches_of
from qvit.preprocessing import Preprocessing
from qvit.quantizers.pixel import PixelQuantizer
from qvit.spec import Operand, PerChannel, PerTensor, QuantSpec

SPEC = QuantSpec(8, False, PerTensor(), PerChannel(), Operand.INPUT)
NORMALISATIONS = [
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ((0.3,), (0.17,)),
    ((0.0,), (1.0,)),
]


@pytest.mark.parametrize(("mean", "std"), NORMALISATIONS)
def test_codes_are_the_pixels_exactly(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """All 256 values in every channel, at every place of a patch, through float32 normalisation."""
    channels = len(mean)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, channels, 1, 1)
    pixels[1] = torch.randint(0, 256, (channels, 16, 16), dtype=torch.uint8)
    preprocessing = Preprocessing((channels, 16, 16), mean=mean, std=std)
    images = torch.from_numpy(preprocessing.normalise(pixels.numpy()))
    got = PixelQuantizer(SPEC, mean, std, 16)(patches_of(images, (4, 4)))
    assert torch.equal(got.codes, patches_of(pixels, (4, 4)).float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = PixelQuantizer(SPEC, mean, std, 16)(patches_of(images, (4, 4)))
    assert torch.equal(cast.codes.float(), got.codes)


def test_codes_of_timms_normalisation_are_the_pixels() -> None:
    """torchvision's ToTensor and Normalize round differently from ours; the codes do not care."""
    transforms = pytest.importorskip("torchvision.transforms")
    mean, std = NORMALISATIONS[0]
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    image = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])(pixels)
    got = PixelQuantizer(SPEC, mean, std, 64)(patches_of(image[None], (8, 8)))
    assert torch.equal(got.codes, patches_of(torch.from_numpy(pixels).permute(2, 0, 1)[None], (8, 8)).float())


def test_value_is_the_image_times_std() -> None:
    mean, std = NORMALISATIONS[0]
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    images = torch.from_numpy(Preprocessing((3, 8, 8), mean=mean, std=std).normalise(pixels))
    got = PixelQuantizer(SPEC, mean, std, 16)(patches_of(images, (4, 4)))
    want = patches_of(images * torch.tensor(std)[:, None, None], (4, 4))
    torch.testing.assert_close(got.value, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.codes * got.scale + got.offset, want, rtol=0, atol=1e-6)


def test_beyond_the_pixels_is_clipped_and_fewer_bits_are_coarser() -> None:
    quantizer = PixelQuantizer(SPEC, (0.5,), (0.5,), 4)
    assert quantizer(torch.full((1, 1, 4), 5.0)).codes.unique().tolist() == [255]
    assert quantizer(torch.full((1, 1, 4), -5.0)).codes.unique().tolist() == [0]
    coarse = PixelQuantizer(QuantSpec(4, False, PerTensor(), PerChannel()), (0.0,), (1.0,), 4)
    levels = coarse(torch.linspace(0, 1, 16).reshape(1, 4, 4)).codes
    assert torch.equal(levels.flatten(), torch.arange(16.0))


def test_has_nothing_to_learn_and_saves_its_normalisation() -> None:
    quantizer = PixelQuantizer(SPEC, *NORMALISATIONS[0], 4)
    assert not list(quantizer.parameters())
    assert set(quantizer.state_dict()) == {"scale", "offset", "std"}
    images = torch.randn(1, 2, 12, requires_grad=True)
    quantizer(images).value.sum().backward()
    assert torch.isfinite(images.grad).all()
