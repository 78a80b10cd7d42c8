"""The kernels' arguments, field by field as the structs in ``src/*.cu``, and what each kernel is launched with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_POINTER, _INT, _UNSIGNED, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_longlong
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double


def _fields(**types: str) -> list[tuple[str, Any]]:
    """``type = "name name .."`` in the order of the struct."""
    kinds = {"p": _POINTER, "i": _INT, "u": _UNSIGNED, "l": _LONG, "f": _FLOAT, "d": _DOUBLE}
    return [(name, kinds[kind[0]]) for kind, names in types.items() for name in names.split()]


class GemmArgs(ctypes.Structure):
    """``src/epilogue.cuh``."""

    _fields_ = _fields(
        p="a b scale bias out out_k out_v residual gamma position inverse offset step shift weight affine steps table index",
        i="m n k ldo rows_in rows_out row_first heads tokens chunks",
        f="low high margin low_k high_k margin_k low_v high_v slope slope_k",
        u="tokens_inverse",
        d="eps",
    )


class AttentionArgs(ctypes.Structure):
    """``src/attention.cu``."""

    _fields_ = _fields(
        p="q k v out map score_scale map_scale value_scale value_row inverse offset step bias regions",
        i="heads ldo images windows",
        f="map_high map_margin low high",
    )


class NormArgs(ctypes.Structure):
    """``src/norm.cu``."""

    _fields_ = _fields(p="x weight bias gain shift offset step index out", l="ldx ldo", i="rows", f="low high margin", d="eps")


class PixelArgs(ctypes.Structure):
    """``src/pixels.cu``."""

    _fields_ = _fields(
        p="images codes std offset out strange",
        i="rows",
        f="step high",
    )


class PoolArgs(ctypes.Structure):
    """``src/pool.cu``."""

    _fields_ = _fields(p="x out", i="tokens first channels")


ARGUMENTS = {
    "gemm": GemmArgs,
    "gemm_hopper": GemmArgs,
    "attention": AttentionArgs,
    "norm": NormArgs,
    "pixels": PixelArgs,
    "pool": PoolArgs,
}


@dataclass(frozen=True)
class Launch:
    """One kernel of a forward pass.

    Attributes:
        kernel: name of its source.
        defines: constants that it is compiled with.
        grid: blocks in x, y, z.
        threads: of a block.
        shared: bytes of shared memory of a block.
        values: field -> number or tensor (its memory is kept as long as the launch).
    """

    kernel: str
    defines: Mapping[str, int]
    grid: tuple[int, int, int]
    threads: int
    shared: int
    values: Mapping[str, Any]
    packed: ctypes.Structure = field(init=False)

    def __post_init__(self) -> None:
        packed = ARGUMENTS[self.kernel]()
        for name, value in self.values.items():
            if isinstance(value, torch.Tensor):
                value = value.data_ptr()
            setattr(packed, name, value)
        object.__setattr__(self, "packed", packed)
