"""Tables and comparisons behind an activation, of the layer in front and the quantizer behind; or why there are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qvit.engines.cuda.folded.activation import ActivationConstants
from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.linear import LinearConstants
from qvit.engines.cuda.layout import untiled
from qvit.engines.cuda.step_tables import CELLS
from qvit.integer.model import IntegerModel
from qvit.quantizers import exact_float
from qvit.spec import ModelSpec

TO = Constants(torch.device("cpu"))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_codes_of_the_sums_in_memory(activation: str, freeze: Callable[..., IntegerModel]) -> None:
    """Read as a kernel reads them, weights and tables of permuted columns give the reference engine's codes."""
    (block,) = freeze(spec=ModelSpec.of_bits(4)).blocks
    layer, following = block.fc1, block.fc2.input
    found, linear = ActivationConstants.of(layer, following, activation, TO), LinearConstants.of(layer, TO)
    assert found.why_not is None
    assert found.permuted is not None
    assert found.cells in CELLS
    width, (m, k) = 64, layer.weight.shape
    arrays = found.permuted.arrays(linear, width, bits=False)
    x = torch.randint(0, layer.input.spec.qp + 1, (50, k))
    sums = (x @ untiled(arrays["b"])[:, :k].long().T).numpy()  # by place
    parts = arrays["table"].numpy().reshape(-1, width * found.permuted.column_bytes)
    numbers = np.ascontiguousarray(parts[:, : 8 * width]).view(np.int32).reshape(-1, 2).astype(np.int64)
    entries = np.ascontiguousarray(parts[:, 8 * width :]).view(np.uint16).reshape(-1, found.cells, 8)
    u = (sums * numbers[:, 0] + numbers[:, 1]).clip(0, (found.cells << 16) - 1)
    place = np.arange(sums.shape[1])
    codes = np.abs(((entries[place // 8, u >> 16, place % 8].astype(np.int64) << 8) + u >> 16) % 256 - 128)
    floats = (x @ untiled(linear.b)[:m, :k].long().T).float() * linear.scale[:m] + linear.bias[:m]
    y = exact_float.activation(floats, activation).numpy()
    y = y if following.offset is None else y - following.offset
    wanted = np.rint(y / following.scale).clip(following.spec.qn, following.spec.qp)
    unpermuted = np.zeros_like(wanted)
    order = untiled_order(width, sums.shape[1])
    unpermuted[:, order[order < m]] = codes[:, order < m]
    assert np.array_equal(unpermuted, wanted)
    assert len(np.unique(wanted)) > 8


def untiled_order(width: int, columns: int) -> np.ndarray:
    """The column of each place: a lane's pairs of every eight columns are a quarter of ``width`` neighbours."""
    place = np.arange(columns)
    return place - place % width + place % 8 // 2 * (width // 4) + 2 * (place % width // 8) + place % 2


@pytest.mark.parametrize(("bits", "counts"), [(2, (3, 0)), (3, (0, 0))])
def test_codes_of_two_bits_are_compared_too(bits: int, counts: tuple[int, int], freeze: Callable[..., IntegerModel]) -> None:
    (block,) = freeze(spec=ModelSpec.of_bits(bits)).blocks
    found = ActivationConstants.of(block.fc1, block.fc2.input, "gelu", TO)
    assert found.permuted is not None
    assert (found.rising, found.falling) == counts
    assert (None if found.compared is None else found.compared.column_bytes) == (6 if bits == 2 else None)


def test_more_codes_than_a_table_has_room_for(freeze: Callable[..., IntegerModel]) -> None:
    (block,) = freeze(spec=ModelSpec.of_bits(8)).blocks
    found = ActivationConstants.of(block.fc1, block.fc2.input, "gelu", TO)
    assert (found.cells, found.permuted, found.why_not) == (0, None, "256 codes, more than 16")
    assert found.compared is None


def test_codes_with_a_sign_have_no_table(freeze: Callable[..., IntegerModel]) -> None:
    (block,) = freeze(spec=ModelSpec.of_bits(4, overrides={"*.fc2.input": {"signed": True}})).blocks
    found = ActivationConstants.of(block.fc1, block.fc2.input, "gelu", TO)
    assert (found.cells, found.permuted, found.why_not) == (0, None, "codes with a sign")
