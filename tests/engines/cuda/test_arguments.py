"""Arguments lie in memory as the kernels read them, and a launch keeps what it points to."""

from __future__ import annotations

import ctypes
import gc
import re
import weakref
from dataclasses import FrozenInstanceError

import pytest
import torch

from qvit.engines.cuda.arguments import ARGUMENTS, AttentionArgs, GemmArgs, Launch, NormArgs, NormedArgs, PixelArgs, PoolArgs
from qvit.engines.cuda.compiler import SOURCES

STRUCTS = {
    "GemmArgs": GemmArgs,
    "AttentionArgs": AttentionArgs,
    "NormArgs": NormArgs,
    "FewArgs": NormedArgs,
    "PixelArgs": PixelArgs,
    "PoolArgs": PoolArgs,
}
TYPES = {
    "int": ctypes.c_int,
    "uint32_t": ctypes.c_uint,
    "long long": ctypes.c_longlong,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "NormArgs": NormArgs,
}


def declared() -> dict[str, tuple[str | None, list[tuple[str, object]]]]:
    """Structs of arguments in the sources: name -> (base, fields)."""
    found = {}
    for path in sorted(SOURCES.glob("*.cu*")):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        for name, base, body in re.findall(r"struct (\w*Args)(?: : (\w+))? \{(.*?)\n\};", text, re.DOTALL):
            fields: list[tuple[str, object]] = []
            for statement in filter(None, (part.strip() for part in body.split(";"))):
                pointer = re.fullmatch(r"(?:const )?\w+\* (\w+)", statement)
                if pointer:
                    fields.append((pointer[1], ctypes.c_void_p))
                    continue
                kind, names = re.fullmatch(r"(long long|\w+) ([\w, ]+)", statement).groups()  # type: ignore[union-attr]
                fields += [(each.strip(), TYPES[kind]) for each in names.split(",")]
            found[name] = base or None, fields
    return found


def test_fields_are_those_of_the_sources() -> None:
    structs = declared()
    assert structs.keys() == STRUCTS.keys()
    for name, (base, fields) in structs.items():
        assert STRUCTS[name]._fields_ == fields, name
        assert (base is None) or issubclass(STRUCTS[name], STRUCTS[base]), name


def test_every_kernel_has_arguments() -> None:
    kernels = {path.stem: path.read_text() for path in SOURCES.glob("*.cu")}
    assert ARGUMENTS.keys() == kernels.keys()
    for kernel, text in kernels.items():
        (taken,) = re.findall(r"kernel\(const (?:QVIT_CONSTANT )?(\w+) p\)", text)
        assert ARGUMENTS[kernel] is STRUCTS[taken], kernel


def test_what_a_launch_packs() -> None:
    x, weight = torch.zeros(3), torch.zeros(5)
    values = {"a": x, "m": 7, "eps": 0.25, "residual": None, "norm": {"weight": weight, "ldx": 2**40}, "norm_eps": 0.5}
    packed = Launch("gemm_few", {"K": 1}, (1, 1, 1), 32, 0, values).packed
    assert (packed.a, packed.m, packed.eps, packed.residual, packed.norm_eps) == (x.data_ptr(), 7, 0.25, None, 0.5)
    assert (packed.norm.weight, packed.norm.ldx, packed.norm.bias) == (weight.data_ptr(), 2**40, None)
    assert (packed.b, packed.n) == (None, 0)


def test_the_driver_sees_what_is_changed_later() -> None:
    launch = Launch("pool", {}, (1, 1, 1), 32, 0, {"tokens": 4})
    (address,) = (ctypes.c_void_p * 1).from_address(launch.arguments)
    launch.packed.tokens = 9
    assert PoolArgs.from_address(address).tokens == 9
    with pytest.raises(FrozenInstanceError):
        launch.shared = 1  # type: ignore[misc]


def test_tensors_live_as_long_as_the_launch() -> None:
    x = torch.zeros(3)
    kept = weakref.ref(x)
    launch = Launch("pool", {}, (1, 1, 1), 32, 0, {"x": x})
    del x
    gc.collect()
    assert kept() is not None
    del launch
    gc.collect()
    assert kept() is None


def test_kernels_with_other_constants_or_memory_are_others() -> None:
    def code(kernel: str = "pool", shared: int = 0, **defines: int) -> str:
        return Launch(kernel, defines, (1, 1, 1), 32, shared, {}).code

    assert code(A=1, B=2) == code(B=2, A=1)
    assert len({code(A=1), code(A=2), code(B=1), code(A=1, shared=8), code("norm", A=1)}) == 5
