"""Cached teacher targets: each image has a few fixed crops, and the teacher answers once for each of them.

With ``distill.cached_crops: n`` the augmentation of an image is a function of (seed, epoch mod n, image), so that from the
n + 1st epoch on every crop has been seen before, and the teacher's logits are read from memory. Images that an epoch left out,
since it ends with a whole step, are answered when they first come up.

Processes see different images in an epoch, so they exchange what they learned at its end. Checkpoints hold the logits where
they are small; where they are not, they are computed again after a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed

from qvit.training.data import EpochSampler

_LARGEST_ON_DEVICE = 1 << 30  # bytes; more of them stay in host memory
_LARGEST_SAVED = 64 << 20  # bytes that a checkpoint may grow by
_PARTS = 8  # a batch's missing answers are computed in eighths of a batch, so that the teacher sees two shapes only
_EXCHANGED = 1 << 26  # numbers that processes exchange at once
VALUES, KNOWN = "targets.values", "targets.known"


class CachedTargets:
    """The teacher's logits of every crop of every training image.

    Args:
        sampler: of the order; `EpochSampler.crops` is the number of crops.
        images: number of training images.
        classes: of the teacher.
        batch_size: images a step of this process.
        device: of the run.
        process, processes: this one, and how many there are.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        images: int,
        classes: int,
        batch_size: int,
        device: torch.device,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.sampler, self.batch_size, self.device = sampler, batch_size, device
        self.process, self.processes = process, processes
        self.slots = (sampler.crops or 1) * sampler.repeats
        size = images * self.slots * classes * 4
        self.values = torch.zeros(images * self.slots, classes, device=device if size <= _LARGEST_ON_DEVICE else "cpu")
        self.known = np.zeros(images * self.slots, dtype=bool)
        self._next = 0

    def start(self) -> None:
        """Call it where an iteration over (the rest of) an epoch begins, after `EpochSampler.start`."""
        images, repeats = self.sampler.positions()
        slot = self.sampler.crop_epoch * self.sampler.repeats + repeats
        batches = (images * self.slots + slot).reshape(-1, self.processes, self.batch_size)
        self._epoch, self._new, self._next = batches, ~self.known[batches], 0
        self._rows = torch.from_numpy(np.ascontiguousarray(batches[:, self.process])).to(self.values.device)

    def next(self, images: torch.Tensor, teacher: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The logits [B, classes], float32, of the next batch's ``images`` [B, C, H, W]; ``teacher`` gives what is missing."""
        rows, places = self._rows[self._next], self._epoch[self._next, self.process]
        self._next += 1
        missing = np.flatnonzero(~self.known[places])
        if len(missing):
            answer = self._ask(images, missing, teacher).to(self.values.device)
            index = rows if len(missing) == len(places) else rows[torch.from_numpy(missing).to(rows.device)]
            self.values[index] = answer
            self.known[places[missing]] = True
        return self.values[rows].to(self.device)

    def _ask(self, images: torch.Tensor, missing: np.ndarray, teacher: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The teacher's logits of the images at the places ``missing`` of a batch."""
        part = -(-len(images) // _PARTS)
        if len(missing) > len(images) // 2:
            every = teacher(images).float()
            return every if len(missing) == len(images) else every[torch.from_numpy(missing).to(every.device)]
        padded = np.pad(missing, (0, -len(missing) % part), mode="edge")
        index = torch.from_numpy(padded).to(images.device)
        return torch.cat([teacher(images[some]).float() for some in index.split(part)])[: len(missing)]

    def share(self) -> None:
        """Exchanges what the processes learned since `start`; each calls it after the same number of batches."""
        if self.processes == 1 or not self._next:
            return
        # Of what is new, which all processes agree on, each row was asked for by one of them.
        new = self._new[: self._next]
        rows = self._epoch[: self._next][new]
        mine = np.broadcast_to((np.arange(self.processes) == self.process)[None, :, None], new.shape)[new]
        step = max(_EXCHANGED // self.values.shape[1], 1)
        for first in range(0, len(rows), step):
            some = torch.from_numpy(rows[first : first + step]).to(self.values.device)
            own = torch.from_numpy(mine[first : first + step]).to(self.device)
            part = torch.where(own[:, None], self.values[some].to(self.device), 0)
            torch.distributed.all_reduce(part)
            self.values[some] = part.to(self.values.device)
        self.known[rows] = True

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it: nothing where that would be large."""
        if self.values.nbytes > _LARGEST_SAVED:
            return {}
        return {VALUES: self.values, KNOWN: torch.from_numpy(self.known.astype(np.uint8))}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `state` gave, if it is among the tensors of a checkpoint."""
        if VALUES in tensors and tensors[VALUES].shape == self.values.shape:
            self.values.copy_(tensors[VALUES])
            self.known[:] = tensors[KNOWN].numpy().astype(bool)
