"""On paper: how long the paper's 300 epochs of ImageNet take on 8 and on 64 GPUs, from step times measured on one host.

Assumptions, all of which the table in docs/results.md repeats:

- the model is the one that was timed, on random images and random weights, which take as long as others; the paper's is
  `PAPER_MODEL`;
- the step and its exchange of gradients within a host are those that `train_scaling.py` measured for the same batch per GPU on
  all GPUs of one host, with images on the device: reading and augmenting them keeps up (`data.workers`, or a cache);
- between hosts gradients are exchanged once a step, after the backward pass, as within a host: hosts pass the sum around in a
  ring, so each sends and receives 2 (hosts - 1) / hosts times the gradients, at `HOST_GB_PER_S`, and hides nothing of it;
- every host and every step takes as long as the measured ones: nobody waits for a straggler, nothing fails;
- evaluation and checkpoints are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

IMAGES = 1_281_167  # training images of ImageNet-1k
EPOCHS = 300
PAPER_BATCH = 512  # images a step
PAPER_MODEL = "deit_small_distilled_patch16_224"
HOST_GB_PER_S = 50.0  # 10^9 bytes a second, each way; an eighth of what a host with eight 400 Gb/s adapters has by name


@dataclass(frozen=True)
class Estimate:
    """What a run of `EPOCHS` epochs would take.

    Attributes:
        gpus, batch: GPUs, and images a step on each.
        step_ms: one step; of it, exchange_ms between hosts.
        images_per_s: over all GPUs.
        hours: of the whole run.
        measured: whether the step itself was measured, on as many GPUs.
    """

    gpus: int
    batch: int
    step_ms: float
    exchange_ms: float
    images_per_s: float
    hours: float
    measured: bool

    @property
    def batch_total(self) -> int:
        """Images a step over all GPUs."""
        return self.gpus * self.batch


def estimate(row: Mapping[str, Any], hosts: int, host_gb_per_s: float = HOST_GB_PER_S) -> Estimate:
    """The run on several hosts like the measured one.

    Args:
        row: of `train_scaling.py`'s result file, measured on all GPUs of a host.
        hosts: how many.
        host_gb_per_s: 10^9 bytes a second that a host sends, and receives, at once.
    """
    gpus = hosts * row["processes"]
    exchange_ms = 2 * (hosts - 1) / hosts * row["gradient_mb"] / host_gb_per_s
    step_ms = row["ms_median"] + exchange_ms
    rate = 1000 * gpus * row["batch"] / step_ms
    return Estimate(gpus, row["batch"], step_ms, exchange_ms, rate, EPOCHS * IMAGES / rate / 3600, hosts == 1)


def estimates(rows: Iterable[Mapping[str, Any]], gpus: Iterable[int] = (8, 64)) -> list[Estimate]:
    """The run on ``gpus`` GPUs, for each batch that was timed on the most GPUs of a host, where hosts add up to as many."""
    timed = [row for row in rows if "gradient_mb" in row]
    host = max((row["processes"] for row in timed), default=0)
    return [
        estimate(row, count // host)
        for count in gpus
        for row in sorted(timed, key=lambda row: row["batch"])
        if row["processes"] == host and count >= host and count % host == 0
    ]
