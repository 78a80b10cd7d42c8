"""The quantized patch projection against the convolution that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qvit.layers.patch_embed import QuantPatchProjection, patches_of
from qvit.layers.points import float_mode
from qvit.preprocessing import Preprocessing
from qvit.spec import Operand, PerChannel, PerTensor, QuantSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [((16, 16), (48, 48)), ((14, 14), (42, 56)), ((4, 2), (9, 7)), ((3, 3), (11, 10)), ((8, 8), (8, 8))]


def projection(
    patch: tuple[int, int], bits: int = 8, bias: bool = True, channels: int = 3
) -> tuple[nn.Conv2d, QuantPatchProjection]:
    conv = nn.Conv2d(channels, 10, kernel_size=patch, stride=patch, bias=bias)
    layer = QuantPatchProjection(
        conv,
        QuantSpec(bits, True, PerChannel(), None, Operand.WEIGHT),
        QuantSpec(8, False, PerTensor(), PerChannel()),
        MEAN[:channels],
        STD[:channels],
    )
    layer.weight_quantizer.set_parameters(layer.effective_weight().detach().abs().amax(1) / (2 ** (bits - 1) - 1))
    return conv, layer


def images(size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    pixels = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8).numpy()
    return torch.from_numpy(Preprocessing((channels, *size), mean=MEAN[:channels], std=STD[:channels]).normalise(pixels))


@pytest.mark.parametrize(("patch", "size"), SIZES)
def test_patches_times_weight_is_the_convolution(patch, size) -> None:
    conv, _ = projection(patch)
    x = torch.randn(2, 3, *size)
    want = conv(x)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    patches = patches_of(x, patch)
    assert patches.shape == (2, rows * columns, 3 * patch[0] * patch[1])
    got = (patches @ conv.weight.flatten(1).t() + conv.bias).transpose(1, 2).reshape(2, 10, rows, columns)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("patch", "size"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_float_mode_is_the_convolution(patch, size, bias: bool) -> None:
    conv, layer = projection(patch, bias=bias)
    x = torch.randn(2, 3, *size)
    with float_mode(layer):
        torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("patch", "size"), SIZES)
@pytest.mark.parametrize("bits", [2, 8])
def test_is_the_convolution_of_the_pixels_with_the_quantized_weight(patch, size, bits: int) -> None:
    """Only the weight is rounded: pixels lose nothing."""
    conv, layer = projection(patch, bits)
    x = images(size)
    std = torch.tensor(STD, dtype=torch.float64)[:, None, None]
    scale = layer.weight_quantizer.scale.detach().double()
    codes = (layer.effective_weight().detach().double() / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight = (codes * scale).reshape(conv.weight.shape) * std
    want = nn.functional.conv2d(x.double(), weight, conv.bias.detach().double(), stride=patch)
    got = layer(x)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


def test_eight_bits_are_close_to_float_and_two_are_not() -> None:
    x = images((48, 48))
    for bits, low, high in ((8, 0.0, 0.02), (2, 0.1, 10.0)):
        conv, layer = projection((16, 16), bits)
        want = conv(x)
        error = ((layer(x) - want).std() / want.std()).item()
        assert low <= error <= high


def test_one_channel() -> None:
    conv, layer = projection((2, 2), channels=1)
    x = images((8, 6), channels=1)
    assert (layer(x) - conv(x)).abs().max() < 0.02


def test_either_operand_may_be_quantized_alone() -> None:
    conv, layer = projection((4, 4), bits=3)
    x = images((8, 8))
    exact = conv(x)
    errors = {}
    for operands in ((), ("input",), ("weight",), ("input", "weight")):
        layer.input_quantizer.enabled, layer.weight_quantizer.enabled = "input" in operands, "weight" in operands
        errors[operands] = (layer(x) - exact).abs().mean().item()
    # Pixels lie on the grid of the input's quantizer: three bits of weights are all that is lost.
    assert errors[()] == 0
    assert errors[("input",)] < 1e-5
    assert errors[("weight",)] > 1e-2
    assert errors[("weight",)] == pytest.approx(errors[("input", "weight")], rel=1e-4)


def test_gradients_reach_weight_bias_and_scale() -> None:
    _, layer = projection((4, 4), bits=3)
    layer(images((8, 8))).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_of_the_weight_is_that_of_the_convolution() -> None:
    """Where no weight is clipped, straight through is the float gradient."""
    conv, layer = projection((4, 4), bits=8)
    x, upstream = images((8, 8)), torch.randn(2, 10, 2, 2)
    (want,) = torch.autograd.grad(conv(x), conv.weight, upstream)
    (got,) = torch.autograd.grad(layer(x), layer.weight, upstream)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
