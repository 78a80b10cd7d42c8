"""A roofline estimate of each engine's time: what multiplies and memory traffic alone would take. Never a measurement.

    time of a batch = max(sum over products of multiplies / ceiling of its widths, bytes moved / bandwidth)

Nothing else is in it: no LayerNorm, softmax, GELU or quantization, no start of kernels, no waiting. Measured times are longer;
docs/performance-cpu.md and `qvit bench` have those. Source of the model: Williams, Waterman, Patterson, "Roofline", 2009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qvit.analyze.cost import ModelCost, ProductCost
from qvit.analyze.products import LINEAR
from qvit.errors import InputError

ESTIMATE_DEFINITION = (
    "a roofline estimate, not a measurement: the larger of multiplies / ceiling and bytes moved / bandwidth; LayerNorm, "
    "softmax, GELU, quantization and waiting are left out"
)
BYTES_DEFINITION = (
    "packed weights once a batch; for each image the codes that products read and write, a byte each, and the residual "
    "stream, 4 bytes a value (2 on the GPU where it is float16); attention's scores and maps never leave the processor"
)


@dataclass(frozen=True)
class Ceiling:
    """What an instruction can do at most, measured on registers, and where an engine uses it.

    Attributes:
        name: of the instruction or kernel.
        multiplies_per_s: multiply-accumulates a second, of one core or of the whole GPU.
        left_bits, right_bits: the widest weights (q, maps) and inputs (k, v) that it takes.
        attention: attention's products run on it too.
        source: where the number comes from.
    """

    name: str
    multiplies_per_s: float
    left_bits: int
    right_bits: int
    attention: bool
    source: str

    def takes(self, cost: ProductCost) -> bool:
        """Whether a product of these widths runs on it."""
        fits = cost.left.bits <= self.left_bits and cost.right.bits <= self.right_bits
        return fits and (self.attention or cost.product.kind == LINEAR)


@dataclass(frozen=True)
class Hardware:
    """What an engine runs on.

    Attributes:
        engine: name of the engine.
        name: of the hardware.
        ceilings: the first that takes a product is the one it runs on.
        bandwidth: bytes read or written a second, of the whole machine.
        bandwidth_source: where that number comes from.
        halves_stream: values of a residual stream of float16 are moved in 2 bytes, as 4 are of any other.
        per_core: the ceilings are those of one core, not of the whole device.
    """

    engine: str
    name: str
    ceilings: tuple[Ceiling, ...]
    bandwidth: float
    bandwidth_source: str
    halves_stream: bool
    per_core: bool = False

    def names(self) -> list[str]:
        """What `with_ceilings` takes: ``cpu.vpdpbusd``, .., ``cpu.bandwidth``."""
        return [f"{self.engine}.{name}" for name in (*(c.name for c in self.ceilings), "bandwidth")]


_REGISTERS = "one core, operands in registers: docs/performance-cpu.md, GEMM kernels (benchmarks/cpu_gemm.cpp)"
_VPDPBUSD = 233e9
CPU = Hardware(
    engine="cpu",
    name="AMD EPYC, Zen 4",
    ceilings=(
        Ceiling("table3", 570e9, 2, 2, False, f"{_REGISTERS}; three products a vpermb lookup, sums not yet widened"),
        Ceiling("pairs", _VPDPBUSD * 4 / 3, 4, 6, False, f"{_REGISTERS}; 4/3 of vpdpbusd's rate, by count of operations"),
        Ceiling("vpdpbusd", _VPDPBUSD, 8, 8, True, _REGISTERS),
    ),
    bandwidth=18.0e9,
    bandwidth_source="copy, read and write counted: benchmarks/results/bandwidth-epyc-zen4-2cores.json",
    halves_stream=False,
    per_core=True,
)
_TENSOR_CORES = "one H100 SXM, operands in registers and shared memory, an operation being half a multiply-accumulate"
GPU = Hardware(
    engine="cuda",
    name="NVIDIA H100 SXM",
    ceilings=(
        Ceiling("b1", 15885e12 / 4 / 2, 2, 2, True, f"{_TENSOR_CORES}: wgmma b1 and.popc 15,885 TOP/s, 2 x 2 bit planes"),
        Ceiling("s8", 1970e12 / 2, 8, 8, True, f"{_TENSOR_CORES}: wgmma s8 1,970 TOP/s (mma.sync s8: 1,281)"),
    ),
    bandwidth=2.97e12,
    bandwidth_source="copy on one H100 SXM, read and write counted",
    halves_stream=True,
)
_GIVEN = "given"  # source of a number that the user replaced
HARDWARE: dict[str, Hardware] = {hardware.engine: hardware for hardware in (CPU, GPU)}


@dataclass(frozen=True)
class Estimate:
    """The roofline estimate of one engine and batch.

    Attributes:
        hardware: what it is for.
        batch: images.
        threads: cores; 0 on a GPU.
        compute_seconds: multiplies over their ceilings, of the batch.
        memory_seconds: bytes moved over the bandwidth, of the batch.
        bytes_moved: of the batch; see `BYTES_DEFINITION`.
    """

    hardware: Hardware
    batch: int
    threads: int
    compute_seconds: float
    memory_seconds: float
    bytes_moved: int

    @property
    def seconds(self) -> float:
        """Of the batch: the larger of the two."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.batch / self.seconds

    @property
    def bound(self) -> str:
        """What decides: ``multiplies`` or ``memory``."""
        return "multiplies" if self.compute_seconds >= self.memory_seconds else "memory"


def estimate(cost: ModelCost, hardware: Hardware, batch: int = 1, threads: int = 1, residual: str = "float32") -> Estimate:
    """Estimates the time of one batch.

    Args:
        cost: the products of one image.
        hardware: ceilings and bandwidth.
        batch: images computed at once; they share one reading of the weights.
        threads: cores of a CPU, each with the ceilings of one; all share the bandwidth.
        residual: what the model's residual stream is rounded to (`qvit.spec.ModelSpec`).

    Raises:
        InputError: ``batch`` or ``threads`` is out of range.
    """
    if batch < 1:
        raise InputError(f"A batch of {batch} is out of range: use 1 or more images.")
    if threads < 1:
        raise InputError(f"{threads} threads are out of range: use 1 or more.")
    threads = threads if hardware.per_core else 0
    per_image = sum(p.multiplies / ceiling_of(p, hardware).multiplies_per_s for p in cost.products)
    stream_bytes = 2 if residual == "float16" and hardware.halves_stream else 4
    traffic = sum(p.product.codes + p.product.floats * stream_bytes for p in cost.products)
    moved = cost.weight_bytes + batch * traffic
    return Estimate(hardware, batch, threads, batch * per_image / max(threads, 1), moved / hardware.bandwidth, moved)


def ceiling_of(cost: ProductCost, hardware: Hardware) -> Ceiling:
    """The ceiling under which a product runs: the first of the hardware's that takes it."""
    return next(ceiling for ceiling in hardware.ceilings if ceiling.takes(cost))


def with_ceilings(hardware: Sequence[Hardware], values: Mapping[str, float]) -> list[Hardware]:
    """The hardware with other numbers, for a machine that was measured by someone else.

    Args:
        hardware: whose ceilings are replaced.
        values: name (`Hardware.names`) -> multiply-accumulates, or bytes, a second.

    Raises:
        InputError: there is no ceiling of that name, or the value is not positive.
    """
    known = [name for item in hardware for name in item.names()]
    for name, value in values.items():
        if name not in known:
            raise InputError(f"There is no ceiling {name!r}: use one of {', '.join(known)}.")
        if not 0 < value < float("inf"):
            raise InputError(f"The ceiling {name}={value:g} is out of range: use a positive number a second.")
    return [_changed(item, values) for item in hardware]


def _changed(hardware: Hardware, values: Mapping[str, float]) -> Hardware:
    def changed(ceiling: Ceiling) -> Ceiling:
        value = values.get(f"{hardware.engine}.{ceiling.name}")
        return ceiling if value is None else replace(ceiling, multiplies_per_s=value, source=_GIVEN)

    bandwidth = values.get(f"{hardware.engine}.bandwidth")
    ceilings = tuple(changed(ceiling) for ceiling in hardware.ceilings)
    if bandwidth is None:
        return replace(hardware, ceilings=ceilings)
    return replace(hardware, ceilings=ceilings, bandwidth=bandwidth, bandwidth_source=_GIVEN)
