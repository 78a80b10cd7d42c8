"""The kernels' arguments, field by field as the structs in ``src``, and what each kernel is launched with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
    """``src/attention_head.cuh``."""

    _fields_ = _fields(
        p="q k v out map score_scale map_scale value_scale value_row offset step gain row_gain shift bias regions",
        i="heads ldo images windows pack near",
        f="map_margin map_unit low high fixed_step fixed_first",
    )


class NormArgs(ctypes.Structure):
    """``src/norm_row.cuh``."""

    _fields_ = _fields(
        p="x weight bias gain shift offset step index out",
        l="ldx ldo",
        i="rows",
        f="low high margin slope eps_float",
        d="eps",
    )


class NormedArgs(GemmArgs):
    """``src/gemm_few.cu``: with the LayerNorm in front, which is left out where there is none."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [("norm", NormArgs)]


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
    "gemm_few": NormedArgs,
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
        values: field -> number, tensor (its memory is kept as long as the launch), or fields of a struct within.
        packed: the arguments; changes to its fields are seen by later launches.
        arguments: address of an array of the arguments' addresses, of which there is one.
        code: names the kernel and what it is compiled and loaded with.
    """

    kernel: str
    defines: Mapping[str, int]
    grid: tuple[int, int, int]
    threads: int
    shared: int
    values: Mapping[str, Any]
    packed: Any = field(init=False)
    arguments: int = field(init=False)
    code: str = field(init=False)
    _addresses: Any = field(init=False)

    def __post_init__(self) -> None:
        packed = ARGUMENTS[self.kernel]()
        _fill(packed, self.values)
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(packed))
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "_addresses", addresses)  # kept as long as `arguments`
        object.__setattr__(self, "arguments", ctypes.addressof(addresses))
        object.__setattr__(self, "code", f"{self.kernel} {sorted(self.defines.items())} {self.shared}")


def _fill(packed: ctypes.Structure, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            _fill(getattr(packed, name), value)
        else:
            setattr(packed, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
