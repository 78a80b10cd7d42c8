"""How the commands show an agreement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvit.cli.show import show_facts

if TYPE_CHECKING:
    from qvit.analyze.agreement import Agreement


def show_agreement(measured: Agreement) -> None:
    """Prints how far integers and fake-quantized graph agree."""
    show_facts(
        {
            "agreement": "kept" if measured.holds else "NOT KEPT",
            "codes": f"{measured.worst_codes:.3f} % equal at the worst point, {measured.worst_point}",
            "logits": f"differ by at most {measured.logits:.2g} of their spread",
            "same top-1": f"{measured.top1:.2f} % of {measured.images} images",
            **_as_trained(measured),
        }
    )


def _as_trained(measured: Agreement) -> dict[str, str]:
    if measured.trained_top1 is None:
        return {}
    return {"as trained": f"{measured.trained_top1:.2f} %, before scales, offsets and norms were rounded to the file's float16"}
