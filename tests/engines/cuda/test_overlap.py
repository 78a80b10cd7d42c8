"""Codes of a tile are made while the next tile is multiplied, on Hopper; bit for bit those of the reference engine."""

from __future__ import annotations

from typing import Any

import pytest

import qvit
from qvit.engines.cuda import CudaEngine, tiles
from qvit.spec import ModelSpec

from .emulator import open_gpu
from .test_cuda import SMALL, check

# Bits, columns of a tile, whether products of planes are made twice, width and heads of the model.
CASES = {
    "planes, twice": (2, 128, True, 128, 2),
    "planes, once": (2, 128, False, 96, 3),
    "planes, narrow": (2, 64, True, 96, 3),
    "bytes": (4, 128, False, 128, 2),
    "bytes, narrow": (3, 64, False, 96, 3),
}


@pytest.mark.parametrize(("bits", "columns", "twice", "width", "heads"), CASES.values(), ids=CASES)
def test_codes(
    bits: int, columns: int, twice: bool, width: int, heads: int, make_student: Any, small_vit: Any, perturb: Any, monkeypatch: Any
) -> None:
    """Blocks with several tiles and with one, the last of which is full neither of rows nor of columns."""
    if bits == 2:
        monkeypatch.setattr(tiles, "_BITS", (tiles.HopperTile(2, columns, 2, bits=True, twice=twice, overlaps=True),))
    else:
        monkeypatch.setattr(tiles, "_HOPPER", (tiles.HopperTile(2, columns, 4, overlaps=True),))
    gpu = open_gpu(hopper=True)
    options = {"embed_dim": width, "num_heads": heads, "depth": 1, "mlp_ratio": 2.5, "img_size": 16}
    model = qvit.freeze(perturb(make_student(small_vit(**SMALL | options), spec=ModelSpec.of_bits(bits))))
    count = 39 if gpu.device.type == "cpu" else 3500
    of = [one for one in CudaEngine(model, gpu).launches(count) if one.defines.get("EPILOGUE") in (1, 2)]
    assert [(one.kernel, one.defines["OVERLAP"], one.defines["kBN"]) for one in of] == [("gemm_hopper", 1, columns)] * 2
    assert all(one.defines["BITS"] == int(bits == 2) and one.defines["COLUMN_STAGES"] for one in of)
    check(model, gpu, count, images_too=False)
