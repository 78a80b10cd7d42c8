"""What makes codes of q, k and v of the sums of qkv: padded, in heads, and as the kernels of permuted columns read it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qvit.engines.cuda.folded.arrays import Constants, by_channel
from qvit.engines.cuda.folded.heads import HeadConstants, doubles_q
from qvit.engines.cuda.folded.linear import LinearConstants
from qvit.engines.cuda.layout import untiled
from qvit.engines.cuda.ramps import ramp_codes
from qvit.engines.cuda.step_tables import slots
from qvit.engines.reference import ReferenceEngine
from qvit.integer.model import IntegerModel
from qvit.integer.ops import Block
from qvit.quantizers import exact_float
from qvit.spec import ModelSpec

TO = Constants(torch.device("cpu"))
F32 = np.float32
COLUMNS, HEAD_DIM = 96, 32


def floats_of(block: Block, model: IntegerModel) -> tuple[np.ndarray, np.ndarray]:
    """Random codes of qkv's input: sums of what lies in memory [100, 3 C], and the reference engine's floats of them."""
    layer, spec = block.qkv, block.qkv.input.spec
    codes = torch.randint(spec.qn, spec.qp + 1, (100, layer.weight.shape[1]), dtype=torch.int16)
    b = untiled(LinearConstants.of(layer, TO).b)[: 3 * COLUMNS, :COLUMNS]
    return (codes.long() @ b.long().T).numpy(), ReferenceEngine(model).linear(codes, layer).numpy()


def steps_of(found: HeadConstants, block: Block) -> np.ndarray:
    """The four numbers of each column, in the columns' own order."""
    assert found.permuted is not None
    arrays = found.permuted.arrays(LinearConstants.of(block.qkv, TO), HEAD_DIM, bits=False)
    order = slots(HEAD_DIM, 512)
    steps = np.zeros((512, 4), np.int32)
    steps[order] = arrays["steps"].numpy()
    assert not steps[3 * COLUMNS :].any()
    return steps[: 3 * COLUMNS]


@pytest.mark.parametrize("bits", range(2, 9))
def test_q_and_its_half_step_share_a_byte_up_to_seven_bits(bits: int, freeze: Callable[..., IntegerModel]) -> None:
    (block,) = freeze(spec=ModelSpec.of_bits(4, overrides={"*.q": bits})).blocks
    assert block.attention.q.half_step
    assert doubles_q(block.attention) == (bits <= 7)
    assert HeadConstants.of(block.attention, block.qkv, TO).doubled == (bits <= 7)


def test_columns_are_padded(freeze: Callable[..., IntegerModel]) -> None:
    """To 512 of 288; where there is no column, steps are 1 and all else 0."""
    (block,) = freeze(spec=ModelSpec.of_bits(4, overrides={"*.k": 3})).blocks
    attention = block.attention
    found = HeadConstants.of(attention, block.qkv, TO)
    for name in ("gain", "shift", "weight", "affine", "offset", "step"):
        array = getattr(found, name)
        assert array.shape == (512,)
        assert (array[3 * COLUMNS :] == (1.0 if name == "step" else 0.0)).all()
        assert torch.isfinite(array).all()
    assert found.ranges == ((-8, 7), (-4, 3), (-8, 7))
    for i, quantizer in enumerate((attention.q, attention.k, attention.v)):
        own = slice(i * COLUMNS, (i + 1) * COLUMNS)
        step = by_channel(quantizer.scale, (3, HEAD_DIM)).reshape(-1)
        assert found.step[own].tolist() == step.tolist()
        rectify = (attention.rectify_q, attention.rectify_k, None)[i]
        weight = np.ones(COLUMNS, F32) if rectify is None else rectify.weight.reshape(-1)
        assert found.weight[own].tolist() == weight.tolist()
        np.testing.assert_allclose(found.gain[own].numpy(), weight / step, rtol=2e-7)
    assert found.rectify
    assert attention.rectify_q is not None
    assert found.eps == attention.rectify_q.eps


@pytest.mark.parametrize("changes", [{}, {"weight_quantizer": "statsq"}])
@pytest.mark.parametrize("rectify", [False, True])
def test_columns_without_irm_are_ramps(rectify: bool, changes: dict[str, str], freeze: Callable[..., IntegerModel]) -> None:
    """v, and q and k too without IRM: a code's byte from the whole sum; q's is counted from its lowest one."""
    model = freeze(spec=ModelSpec.of_bits(3, rectify=rectify, **changes))
    (block,) = model.blocks
    found = HeadConstants.of(block.attention, block.qkv, TO)
    assert found.why_not is None
    assert found.rectify == rectify
    steps, (sums, y) = steps_of(found, block), floats_of(block, model)
    for i, quantizer in enumerate((block.attention.q, block.attention.k, block.attention.v)):
        if i < 2 and rectify:
            continue
        own = slice(i * COLUMNS, (i + 1) * COLUMNS)
        step = by_channel(quantizer.scale, (3, HEAD_DIM)).reshape(-1)
        offset = 0 if quantizer.offset is None else by_channel(quantizer.offset, (3, HEAD_DIM)).reshape(-1)
        wanted = np.rint((y[:, own] - offset) / step).clip(quantizer.spec.qn, quantizer.spec.qp)
        wanted -= quantizer.spec.qn if i == 0 else 0
        numbers = np.concatenate([steps[own, :2], steps[own, 2:].view(np.uint32)], 1, dtype=np.int64)  # two have no sign
        codes = ramp_codes(numbers, sums[:, own])
        assert np.array_equal(codes.astype(np.uint8).view(np.int8), wanted)
        assert len(np.unique(wanted)) > 4


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_columns_behind_irm_lead_to_places(bits: int, freeze: Callable[..., IntegerModel]) -> None:
    """Scale, bias, gain and shift of two columns at a time; places are as near to the codes as the margins say."""
    model = freeze(spec=ModelSpec.of_bits(4, overrides={"*.q": bits, "*.k": bits}))
    (block,) = model.blocks
    attention = block.attention
    found = HeadConstants.of(attention, block.qkv, TO)
    steps, (sums, y) = steps_of(found, block), floats_of(block, model)
    # [pair, column of the pair, number]: the first four are scale, bias, scale, bias, then gain, shift, gain, shift.
    numbers = steps[: 2 * COLUMNS].view(F32).reshape(-1, 2, 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    for i, (quantizer, rectify) in enumerate(((attention.q, attention.rectify_q), (attention.k, attention.rectify_k))):
        assert rectify is not None
        own, spec = slice(i * COLUMNS, (i + 1) * COLUMNS), quantizer.spec
        scale, bias, gain, shift = numbers[own].T
        rows = sums[:, own].astype(F32) * scale + bias
        assert np.array_equal(rows, y[:, own])
        heads = torch.from_numpy(rows).reshape(100, 3, HEAD_DIM)
        z = exact_float.standardise(heads, rectify.eps)
        x = z * torch.from_numpy(rectify.weight) + torch.from_numpy(rectify.bias)
        step, offset = (by_channel(a, (3, HEAD_DIM)) for a in (quantizer.scale, quantizer.offset) if a is not None)
        exact = ((x.numpy() - offset) / step).astype(np.float64).reshape(100, COLUMNS)
        place = z.numpy().reshape(100, COLUMNS) * gain + shift
        error = np.abs(place.astype(np.float64) * (spec.qp - spec.qn) + spec.qn - exact)
        margin, _ = found.permuted_margins[i]
        near = (exact > spec.qn) & (exact < spec.qp)
        assert near.mean() > 0.2
        assert float(error[near].max()) <= margin < 0.01


def test_why_columns_are_not_permuted(freeze: Callable[..., IntegerModel]) -> None:
    (block,) = freeze(spec=ModelSpec.of_bits(4, overrides={"*.k": 8})).blocks
    found = HeadConstants.of(block.attention, block.qkv, TO)
    assert found.permuted is None
    assert found.why_not == "k: 256 codes behind a standardisation, more than 128"
    assert 0 < max(found.margins) < 0.01  # of the way that is left
