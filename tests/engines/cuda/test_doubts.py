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
from qvit.engines.reference import ReferenceEngine
from qvit.integer import ops
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
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
