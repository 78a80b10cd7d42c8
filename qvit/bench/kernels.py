"""Where the time of the CUDA engine goes: every kernel of a forward pass, beside what the GPU could do at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qvit.bench.ceilings import Ceilings
from qvit.bench.on_device import milliseconds
from qvit.engines.cuda import CudaEngine
from qvit.engines.cuda.arguments import Launch

Clock = Callable[[Sequence[Launch]], float]

_LEAST_LAUNCHES = 24  # in a measured graph, whose own start then hardly counts
_EPILOGUES = ("floats", "activation", "heads", "floats and codes")


@dataclass(frozen=True)
class Work:
    """What a launch must do at least.

    Attributes:
        shape: for tables.
        operations: of integer products; a multiplication and an addition are two.
        bytes: of global memory, each operand once.
        rate: operations that the tensor cores do in the time of one of int8: two where two-bit codes are multiplied as planes,
            by four one-bit products, each eight times as fast.
    """

    shape: str
    operations: int
    bytes: int
    rate: float = 1.0


def kernel_rows(engine: CudaEngine, batch: int, ceilings: Ceilings, clock: Clock | None = None) -> list[dict[str, Any]]:
    """Times each kernel of a forward pass of ``batch`` uint8 images by itself.

    Launches of one kernel and one shape, as those of all blocks, run one after another, again and again; so what they read may
    still be in the cache, as it may be behind the kernel that wrote it.

    Args:
        engine: whose kernels.
        batch: images.
        ceilings: of its device.
        clock: launches -> milliseconds of all of them; by default the device's own clock.

    Returns:
        Rows of a result file, the slowest first: ``kernel``, ``shape``, ``launches`` in a forward pass, ``ms`` and ``percent``
        of all of them together, ``tops`` and ``gb_per_s`` that they reach, ``bound`` (``compute`` or ``memory``: which ceiling
        takes longer) and ``share_of_bound``, 1 where the kernel is as fast as that ceiling.
    """
    clock = clock or _clock_of(engine)
    launches = engine.launches(batch)
    groups: dict[Any, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(_kind(launch), []).append(launch)
    rows: list[dict[str, Any]] = []
    for group in groups.values():
        for launch in launches:  # how long a kernel takes depends a little on the values that it finds
            engine.launch(launch)
        ms = clock(group)
        work = work_of(group[0])
        computing = 1e-9 * len(group) * work.operations / (work.rate * ceilings.int8_tops)
        moving = 1e-6 * len(group) * work.bytes / ceilings.gb_per_s
        rows.append(
            {
                "kernel": group[0].kernel,
                "shape": work.shape,
                "launches": len(group),
                "ms": ms,
                "tops": 1e-9 * len(group) * work.operations / ms,
                "gb_per_s": 1e-6 * len(group) * work.bytes / ms,
                "bound": "compute" if computing > moving else "memory",
                "share_of_bound": max(computing, moving) / ms,
            }
        )
    total = sum(row["ms"] for row in rows)
    for row in rows:
        row["percent"] = 100 * row["ms"] / total
    return sorted(rows, key=lambda row: -row["ms"])


def _kind(launch: Launch) -> Any:
    """What launches of one kernel and one shape share."""
    shape = tuple((name, value) for name, value in sorted(launch.values.items()) if isinstance(value, int))
    given = tuple(name for name, value in sorted(launch.values.items()) if isinstance(value, torch.Tensor))
    return launch.kernel, tuple(sorted(launch.defines.items())), launch.grid, launch.threads, launch.shared, shape, given


def _clock_of(engine: CudaEngine) -> Clock:
    def clock(launches: Sequence[Launch]) -> float:
        times = -(-_LEAST_LAUNCHES // len(launches))

        def run() -> None:
            for launch in [*launches] * times:
                engine.launch(launch)

        if engine.device.type != "cuda":
            return milliseconds(run, engine.device, calls=1) / times
        run()  # compiled before it is recorded
        graph = torch.cuda.CUDAGraph()
        # On a stream of the engine's GPU: PyTorch's own for recording is of the GPU that recorded first.
        with torch.cuda.device(engine.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(engine.device)):
            run()
        return milliseconds(graph.replay, engine.device) / times

    return clock


def work_of(launch: Launch) -> Work:
    """What a launch must do at least, of its shape."""
    return _WORK[launch.kernel](launch) if launch.kernel in _WORK else _unknown(launch)


def _gemm(launch: Launch) -> Work:
    values = launch.values
    m, n, k = values["m"], values["n"] - launch.defines.get("FIRST", 0), values["k"]
    bits, out = bool(launch.defines.get("BITS")), values["out"].element_size()
    packed = 4 if launch.defines.get("OUT_BITS") else 2 if launch.defines.get("OUT_NIBBLES") else 1  # codes a byte
    moved = (m * k + n * k) // (4 if bits else 1) + m * n * out // (packed if out == 1 else 1)
    if launch.defines.get("A_NIBBLES"):
        moved -= m * k // 2
    if launch.defines["EPILOGUE"] == 3:  # the codes beside the floats
        moved += m * n // (4 if launch.defines["OUT_BITS"] else 1)
    if "norm" in values:  # floats come in, and no codes
        moved += m * k * (values["norm"]["x"].element_size() - 1)
    if values.get("residual") is not None:
        moved += m * n * out
    if values.get("position") is not None:
        moved += 4 * n * values["rows_in"]
    moved += _bytes(values.get("index"))
    shape = f"{m} x {n} x {k}, {_EPILOGUES[launch.defines['EPILOGUE']]}{', planes' if bits else ''}"
    return Work(shape, 2 * m * n * k, moved, 2.0 if bits else 1.0)


def _attention(launch: Launch) -> Work:
    of, values = launch.defines, launch.values
    tokens, queries, width = of["TOKENS"], of["QUERIES"], of["HEAD_DIM"]
    heads = values["images"] * values["heads"]
    row, out = heads * width, heads * queries * width  # a token of q, k or v; what comes out
    moved = (
        row * (2 * tokens + queries) + out // (4 if of["OUT_BITS"] else 1) + _bytes(values["bias"]) + _bytes(values["regions"])
    )
    some = f", {queries} queries" if queries < tokens else ""
    return Work(f"{heads} heads of {tokens} x {width}{some}", 4 * heads * queries * tokens * width, moved)


def _norm(launch: Launch) -> Work:
    rows, channels = launch.values["rows"], launch.defines["CHANNELS"]
    out = rows * channels * launch.values["out"].element_size() // (4 if launch.defines["OUT_BITS"] else 1)
    moved = rows * channels * launch.values["x"].element_size() + out + _bytes(launch.values["index"])
    return Work(f"{rows} x {channels}", 0, moved)


def _bytes(tensor: torch.Tensor | None) -> int:
    """Of a tensor that a launch is given, or not."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _pixels(launch: Launch) -> Work:
    images, of = launch.values["images"], launch.defines
    patch = of["CHANNELS"] * of["PATCH_HEIGHT"] * of["PATCH_WIDTH"]
    moved = images.numel() * images.element_size() + launch.values["rows"] * patch
    return Work(" x ".join(map(str, images.shape)), 0, moved)


def _pool(launch: Launch) -> Work:
    values = launch.values
    images, tokens = len(values["out"]), values["tokens"] - values["first"]
    moved = images * values["channels"] * (values["x"].element_size() * tokens + 4)
    return Work(f"{images} x {values['tokens']} x {values['channels']}", 0, moved)


def _unknown(launch: Launch) -> Work:
    """Every tensor that the launch is given, whole."""
    tensors = [value for value in launch.values.values() if isinstance(value, torch.Tensor)]
    return Work(" x ".join(map(str, launch.grid)) + " blocks", 0, sum(map(_bytes, tensors)))


_WORK: dict[str, Callable[[Launch], Work]] = {
    "gemm": _gemm,
    "gemm_few": _gemm,
    "gemm_hopper": _gemm,
    "attention": _attention,
    "norm": _norm,
    "pixels": _pixels,
    "pool": _pool,
}
