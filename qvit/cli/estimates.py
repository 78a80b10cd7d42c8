"""The roofline estimates of ``qvit inspect``: their options, table and rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qvit.analyze.cost import ModelCost
from qvit.analyze.roofline import (
    BYTES_DEFINITION,
    ESTIMATE_DEFINITION,
    HARDWARE,
    Estimate,
    Hardware,
    ceiling_of,
    with_ceilings,
)
from qvit.cli.show import count, show_facts, show_table
from qvit.cli.spec_options import pair
from qvit.errors import InputError


def hardware_of(ceilings: Sequence[str]) -> list[Hardware]:
    """Every engine's hardware with the numbers of ``--ceiling``; raises `InputError` where one is no such number."""
    return with_ceilings(list(HARDWARE.values()), dict(_ceiling(text) for text in ceilings))


def _ceiling(text: str) -> tuple[str, float]:
    name, value = pair(text, "--ceiling", "cpu.vpdpbusd=497e9")
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f"--ceiling {text!r} is no number: write it as cpu.vpdpbusd=497e9.") from None


def show_estimates(estimates: list[Estimate]) -> None:
    """Prints the estimates, and under them what they are made of."""
    print()
    show_table(
        "Roofline estimate, not measured: what multiplies and memory traffic alone would take",
        ["engine", "hardware", "batch", "threads", "multiplies, ms", "memory, ms", "estimate, ms", "images/s", "bound by"],
        [
            (
                item.hardware.engine,
                item.hardware.name,
                item.batch,
                item.threads or "",
                f"{1e3 * item.compute_seconds:.4g}",
                f"{1e3 * item.memory_seconds:.4g}",
                f"{1e3 * item.seconds:.4g}",
                count(item.images_per_s),
                item.bound,
            )
            for item in estimates
        ],
        left=2,
    )
    ceilings = {
        f"{item.hardware.engine}.{c.name}": f"{c.multiplies_per_s:.4g} multiplies/s ({c.source})"
        for item in estimates
        for c in item.hardware.ceilings
    }
    bandwidths = {
        f"{item.hardware.engine}.bandwidth": f"{item.hardware.bandwidth:.4g} bytes/s ({item.hardware.bandwidth_source})"
        for item in estimates
    }
    show_facts({"estimate": ESTIMATE_DEFINITION, "bytes moved": BYTES_DEFINITION, **ceilings, **bandwidths})


def estimate_row(item: Estimate, cost: ModelCost, total: dict[str, Any]) -> dict[str, Any]:
    """An estimate as a flat object, none of whose keys are those of a measurement."""
    by_ceiling: dict[str, int] = {}
    for product in cost.products:
        name = ceiling_of(product, item.hardware).name
        by_ceiling[name] = by_ceiling.get(name, 0) + product.multiplies
    return {
        "layer": "roofline estimate",
        **{key: total[key] for key in ("model", "weight_bits", "act_bits")},
        "engine": item.hardware.engine,
        "hardware": item.hardware.name,
        "batch": item.batch,
        "threads": item.threads or None,
        "estimate_ms": 1e3 * item.seconds,
        "estimate_images_per_s": item.images_per_s,
        "estimate_multiplies_ms": 1e3 * item.compute_seconds,
        "estimate_memory_ms": 1e3 * item.memory_seconds,
        "bytes_moved": item.bytes_moved,
        "bound_by": item.bound,
        **{f"multiplies_on_{name}": multiplies for name, multiplies in by_ceiling.items()},
        **{f"ceiling_{c.name}": c.multiplies_per_s for c in item.hardware.ceilings},
        "bandwidth": item.hardware.bandwidth,
    }
