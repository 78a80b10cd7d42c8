"""Values beside the boundary between two codes, nearer than float32 can tell: kernels must doubt them, and decide as defined.

Random models have few such values, so biases are set here that bring all channels of one row there; a row whose mean is far
from zero, as its square takes digits from the variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.engines.cuda import CudaEngine, tiles
from qvit.engines.cuda.folded import margins
from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.norm import NormConstants
from qvit.engines.cuda.layout import chunks, untiled
from qvit.engines.cuda.products import Products
from qvit.engines.reference import ReferenceEngine
from qvit.integer import ops
from qvit.integer.model import IntegerModel
from qvit.quantizers import exact_float
from qvit.spec import ModelSpec, PerChannel, QuantSpec
from tests.engines.cuda.emulator import open_gpu
from tests.engines.cuda.test_cuda import SMALL

TOKEN = 2  # whose values are there
BESIDE = 3e-4  # codes from the boundary, at most
FAR = 100.0  # deviations from zero, about, of means


class Watched(ReferenceEngine):
    """Keeps what the first LayerNorm standardises, and what IRM does of q and k."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__(model)
        self.seen: dict[int, torch.Tensor] = {}

    def norm(self, x: torch.Tensor, norm: ops.LayerNorm | None) -> torch.Tensor:
        self.seen.setdefault(id(norm), x)
        return super().norm(x, norm)

    def rectify(self, x: torch.Tensor, rectify: ops.Rectify | None) -> torch.Tensor:
        self.seen.setdefault(id(rectify), x)
        return super().rectify(x, rectify)


def bring(part: ops.LayerNorm | ops.Rectify, quantizer: ops.Quantizer, x: torch.Tensor, rng: np.random.Generator) -> None:
    """Sets biases so that row x [.., C] ends beside boundaries between codes."""
    wide = x.double().numpy()
    z = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + part.eps)
    lower = rng.integers(quantizer.spec.qn, quantizer.spec.qp, z.shape)
    place = lower + 0.5 + rng.uniform(-BESIDE, BESIDE, z.shape)

    def spread(values: np.ndarray) -> np.ndarray:  # [1], [C], [H, 1, 1] or [H, 1, D]
        values = values.astype(np.float64)
        return values[:, 0, :] if values.ndim == 3 else values

    wanted = place * spread(quantizer.scale) + (0.0 if quantizer.offset is None else spread(quantizer.offset))
    object.__setattr__(part, "bias", (wanted - z * part.weight).astype(np.float32))


@pytest.mark.parametrize("residual", ["float32", "float16"])
@pytest.mark.parametrize(
    ("bits", "hopper", "images"),
    [(2, True, 27), (4, True, 27), (8, True, 27), (4, False, 1), (8, False, 1)],
    ids=["planes", "4 bits", "8 bits", "4 bits, few rows", "8 bits, few rows"],
)
def test_what_is_beside_a_boundary_is_decided_as_defined(
    bits: int,
    hopper: bool,
    images: int,
    residual: str,
    make_student: Callable[..., Any],
    small_vit: Callable[..., Any],
    perturb: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 0)
    gpu, rng = open_gpu(hopper), np.random.default_rng(bits)
    gpu.multiprocessors = 2
    options = {"embed_dim": 128, "num_heads": 4, "depth": 1, "mlp_ratio": 0.5, "img_size": 16}
    spec = ModelSpec.of_bits(bits, residual=residual)
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=spec)))
    pixels = torch.randint(0, 256, (1, *model.preprocessing.input_size), dtype=torch.uint8)
    image = torch.from_numpy(model.preprocessing.normalise(pixels.numpy()))
    block = model.blocks[0]
    attention = block.attention

    position = np.array(model.pos_embed)
    position[..., TOKEN, :] += 5 * FAR * position.std()  # patches add to its deviation
    object.__setattr__(model, "pos_embed", position)
    width = options["embed_dim"]
    bias = np.array(block.qkv.bias)
    bias[: 2 * width] += 2 * FAR  # of q and k, whose deviation is about two
    object.__setattr__(block.qkv, "bias", bias)
    assert "_folded_bias" not in vars(block.qkv)

    def seen(part: Any) -> torch.Tensor:
        reference = Watched(model)
        reference.forward(image)
        return reference.seen[id(part)]

    bring(block.norm1, block.qkv.input, seen(block.norm1)[0, TOKEN], rng)
    q, k = attention.rectify_q, attention.rectify_k
    for part, quantizer in ((q, attention.q), (k, attention.k)):
        bring(part, quantizer, seen(part)[0, :, TOKEN], rng)
    wanted: dict[str, torch.Tensor] = {}
    codes: dict[str, torch.Tensor] = {}
    logits = ReferenceEngine(model).forward(image, wanted)
    found = CudaEngine(model, gpu).forward(pixels.expand(images, -1, -1, -1).contiguous(), codes)
    for name, code in wanted.items():
        assert torch.equal(codes[name].cpu(), code.expand_as(codes[name])), name
    assert torch.equal(found.cpu(), logits.expand(images, -1))


@pytest.mark.parametrize(("images", "hopper", "way"), [(1, False, "SPLIT"), (9, False, "plain"), (9, True, "RING")])
def test_a_score_beside_a_boundary_of_the_map_is_decided_as_defined(
    images: int,
    hopper: bool,
    way: str,
    make_student: Callable[..., Any],
    small_vit: Callable[..., Any],
    perturb: Callable[..., Any],
) -> None:
    """The map's step is such that some value of some row is half a code beside a whole one, as nearly as float32 has it."""
    gpu = open_gpu(hopper)
    gpu.multiprocessors = 2
    options = {"embed_dim": 64, "num_heads": 1, "depth": 1, "img_size": 56}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(4))))
    pixels = torch.randint(0, 256, (1, *model.preprocessing.input_size), dtype=torch.uint8)
    image = torch.from_numpy(model.preprocessing.normalise(pixels.numpy()))
    attention, reference = model.blocks[0].attention, ReferenceEngine(model)
    wanted: dict[str, torch.Tensor] = {}
    reference.forward(image, wanted)
    scores = reference.scores(wanted["blocks.0.attn.q"], wanted["blocks.0.attn.k"], attention)
    values = exact_float.softmax(scores).flatten().numpy()
    step = float(attention.map.scale.flat[0])
    codes_of = np.floor(values / step)
    inside = np.flatnonzero((codes_of >= 1) & (codes_of < attention.map.spec.qp))
    for i in np.random.default_rng(images).choice(inside, 12, replace=False):
        scale = np.full_like(attention.map.scale, values[i] / (codes_of[i] + 0.5))
        object.__setattr__(attention.map, "scale", scale)
        engine, expected = CudaEngine(model, gpu, all_tokens=True), ReferenceEngine(model).forward(image, wanted)
        (launch,) = (one for one in engine.launches(images) if one.kernel == "attention")
        assert launch.defines["ROW_CHECK"]
        assert [launch.defines[key] > 0 for key in ("SPLIT", "RING")] == [way == "SPLIT", way == "RING"]
        codes: dict[str, torch.Tensor] = {}
        found = engine.forward(pixels.expand(images, -1, -1, -1).contiguous(), codes)
        for name, code in wanted.items():
            assert torch.equal(codes[name].cpu(), code.expand_as(codes[name])), name
        assert torch.equal(found.cpu(), expected.expand(images, -1))


@pytest.mark.parametrize("doubted", ["some", "all"])
@pytest.mark.parametrize(
    ("channels", "pieces", "bits", "far", "dtype"),
    [
        (1056, 0, 4, 30, torch.float32),  # 33 values a lane, one by one
        (1280, 4, 8, 7, torch.float16),  # 40, by fours; rows are put together
        (2112, 0, 2, 50, torch.float32),  # 66, in pairs, with a third word for two
        (1100, 0, 4, 30, torch.float32),  # lanes without a last value
    ],
)
def test_doubts_of_more_values_a_lane_than_a_word_has_bits(
    channels: int, pieces: int, bits: int, far: int, dtype: torch.dtype, doubted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LayerNorm by itself, as those of a ViT-H and of Swin's merged patches are wider than 1,024.

    Every other 128 channels of one row, and so several of each lane, are beside a boundary, and others far from one; or margins
    are a whole step everywhere. ``far``: deviations from zero of that row's mean.
    """
    if doubted == "all":
        monkeypatch.setattr(margins, "ULPS", 1.0)
    gpu, rng, rows, row = open_gpu(hopper=False), np.random.default_rng(channels), 5, 3
    x = torch.from_numpy(rng.normal(size=(rows, channels)).astype(np.float32)).to(dtype)
    x[row] += far
    spec = QuantSpec(bits, False, offset=PerChannel())
    few, many = ((rng.uniform(1, 2, channels) * size).astype(np.float32) for size in (3 / 2**bits, 1))
    quantizer = ops.Quantizer(spec, few[:1], (-many).astype(np.float32))
    norm = ops.LayerNorm(many, np.zeros(channels, np.float32), 1e-6)
    bring(norm, quantizer, x[row], rng)
    bias = np.where(np.arange(channels) // 128 % 2, norm.bias, norm.bias + 0.4 * few[0])
    object.__setattr__(norm, "bias", bias.astype(np.float32))

    products = Products(gpu, gpu.device, one_bit=False, poison=True, activation="gelu", may_be_late=False)
    constants, out = NormConstants.of(norm, quantizer, Constants(gpu.device)), products._codes(rows, channels)
    a, slope = constants.place_margins
    margin = a + slope * float((x[row].double() ** 2).mean() / x[row].double().var())
    assert 0.03 < margin < 0.1 if doubted == "some" else margin > 1
    index = torch.randperm(rows * pieces).int() if pieces else None
    lies = x
    if index is not None:
        lies = torch.empty(rows * pieces, channels // pieces, dtype=dtype)
        lies[index.long()] = x.reshape(lies.shape)
        index = index.to(gpu.device)
    products._norm(constants, lies.to(gpu.device), out, rows, lies.shape[1], chunks(channels), index=index)
    (step,) = products.steps
    gpu.compile([step.launch])
    gpu.launch(step.launch)
    y = exact_float.layer_norm(x.float(), torch.from_numpy(norm.weight), torch.from_numpy(norm.bias), norm.eps)
    wanted = (y - torch.from_numpy(quantizer.offset)) / torch.from_numpy(quantizer.scale)
    wanted = wanted.round().clamp(spec.qn, spec.qp)
    found = untiled(out.cpu())[:rows, :channels]
    assert torch.equal(found, wanted.to(torch.uint8))
    assert wanted[row].unique().numel() > 2
