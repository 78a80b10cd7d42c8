"""All statistics of attention in one pass over the images: distributions of q and k, reach, similarity to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qvit.analyze.attention_distance import AttentionDistance, class_token_map, patch_distances
from qvit.analyze.distributions import CodeCounter, CodeShares, Histogram, HistogramCounter
from qvit.analyze.trace import BlockTrace, Grid, Tracer
from qvit.architecture import VitArchitecture
from qvit.distill.similarity import similarity_distance
from qvit.errors import InputError
from qvit.preprocessing import Preprocessing

TENSORS = ("q", "k")


@dataclass(frozen=True)
class Subject:
    """A model that is looked at.

    Attributes:
        title: what figures call it.
        tracer: runs it.
        preprocessing: of its images, of which the normalisation is used.
        architecture: where its patches lie; ``None`` where they do not lie on one grid.
    """

    title: str
    tracer: Tracer
    preprocessing: Preprocessing
    architecture: Any

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of patches."""
        a = self.architecture
        if not isinstance(a, VitArchitecture):
            return None
        return a.img_size[0] // a.patch_size[0], a.img_size[1] // a.patch_size[1]

    def run(self, pixels: np.ndarray) -> list[BlockTrace]:
        """uint8 pixels [B, C, H, W] -> the traces of its blocks."""
        return self.tracer(torch.from_numpy(self.preprocessing.normalise(pixels)))


@dataclass(frozen=True)
class TensorDistribution:
    """q or k of one block.

    Attributes:
        before: values as the qkv layer gives them, all heads together.
        after: as they enter the quantizer, after IRM; ``None`` where there is no IRM.
        codes: what the quantizer makes of them; ``None`` for a float model.
        codes_before: what the same grid would make of ``before`` with the step of least squared error on the first images,
            which is where training starts; ``None`` where there is no IRM.
    """

    before: Histogram
    after: Histogram | None
    codes: CodeShares | None
    codes_before: CodeShares | None


@dataclass(frozen=True)
class AttentionStatistics:
    """What was measured on one model.

    Attributes:
        distributions: one a block, "q" and "k".
        distance: mean attention distance in pixels, [L, H]; ``None`` where attention has no single grid.
        uniform: that distance for attention that is the same everywhere.
        skipped: share of the rows of attention whose codes are all zeros.
        similarity: "q" and "k" -> distance of the similarity matrices to the teacher's in each block, mean over images (and
            windows), [H] each; ``None`` without a teacher of the same shape.
    """

    distributions: list[dict[str, TensorDistribution]]
    distance: np.ndarray | None
    uniform: float | None
    skipped: float
    similarity: dict[str, list[np.ndarray]] | None


def measure(subjects: Mapping[str, Subject], batches: Iterable[np.ndarray], teacher: str) -> dict[str, AttentionStatistics]:
    """Runs every model on the same images; memory does not grow with their number.

    Args:
        subjects: the models by their roles.
        batches: uint8 pixels [B, C, H, W].
        teacher: the role that similarities are compared with, where there is one of that name.

    Raises:
        InputError: there are no images.
    """
    accumulators = {role: _Accumulator(subject) for role, subject in subjects.items()}
    images = 0
    for pixels in batches:
        images += len(pixels)
        traces = {role: subject.run(pixels) for role, subject in subjects.items()}
        for role, accumulator in accumulators.items():
            accumulator.add(len(pixels), traces[role], traces.get(teacher) if role != teacher else None)
    if not images:
        raise InputError("There are no images to measure attention on.")
    return {role: accumulator.result(images) for role, accumulator in accumulators.items()}


def class_token_maps(subject: Subject, pixels: np.ndarray) -> np.ndarray | None:
    """Attention of the class token to the patches, mean of the heads, float32 [images, L, rows, columns].

    ``None`` where the model has no class token or no single grid of patches.
    """
    a, grid = subject.architecture, subject.grid
    if grid is None or not a.class_token:
        return None
    traces = subject.run(pixels)
    if any(trace.attention is None for trace in traces):
        return None
    maps = [class_token_map(_array(trace.attention), a.num_prefix_tokens, grid) for trace in traces]
    return np.stack(maps, axis=1).astype(np.float32)


class _Accumulator:
    """Statistics of one model, batch by batch."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._blocks: list[dict[str, _TensorCounter]] = []
        self._distances: list[AttentionDistance] = []
        self._similarity: dict[tuple[str, int], np.ndarray | float] = {}

    def add(self, images: int, traces: list[BlockTrace], teacher: list[BlockTrace] | None) -> None:
        if not self._blocks:
            self._begin(traces)
        for block, trace in zip(self._blocks, traces, strict=True):
            for counter in block.values():
                counter.add(trace)
        for distance, trace in zip(self._distances, traces, strict=False):
            distance.add(_array(trace.attention))
        if teacher is not None and _comparable(traces, teacher):
            for name in TENSORS:
                for index, (own, theirs) in enumerate(zip(traces, teacher, strict=True)):
                    # The mean over what the batch counts, images or windows, weighted by the images.
                    distances = similarity_distance(own.inputs[name], theirs.inputs[name]).double().mean(0).cpu().numpy()
                    self._similarity[name, index] = self._similarity.get((name, index), 0.0) + images * distances

    def _begin(self, traces: list[BlockTrace]) -> None:
        self._blocks = [{name: _TensorCounter(trace, name) for name in TENSORS} for trace in traces]
        grid, a = self.subject.grid, self.subject.architecture
        self.uniform = None
        if grid is not None and all(trace.attention is not None for trace in traces):
            pixels = patch_distances(grid, a.patch_size)
            self.uniform = float(pixels.mean())
            self._distances = [AttentionDistance(pixels, a.num_prefix_tokens, t.raw["q"].shape[1]) for t in traces]

    def result(self, images: int) -> AttentionStatistics:
        rows = images * sum(d.distances.shape[0] * len(d.result()) for d in self._distances)
        similarity = None
        if self._similarity:
            blocks = range(len(self._blocks))
            similarity = {name: [np.asarray(self._similarity[name, b]) / images for b in blocks] for name in TENSORS}
        return AttentionStatistics(
            distributions=[{name: counter.result() for name, counter in block.items()} for block in self._blocks],
            distance=np.stack([d.result() for d in self._distances]) if self._distances else None,
            uniform=self.uniform,
            skipped=sum(d.skipped for d in self._distances) / rows if rows else 0.0,
            similarity=similarity,
        )


class _TensorCounter:
    """Values and codes of q or k in one block."""

    def __init__(self, trace: BlockTrace, name: str) -> None:
        self.name = name
        self.before = HistogramCounter()
        self.after = HistogramCounter() if trace.rectified else None
        self.codes = self.codes_before = None
        self._quantize: Callable[[torch.Tensor], torch.Tensor] | None = None
        grid = trace.grids.get(name)
        if grid is not None:
            self.codes = _code_counter(grid, trace.raw[name])
            if trace.rectified:
                self.codes_before = _code_counter(grid, trace.raw[name])
                self._quantize = grid.fitted_to(trace.raw[name])

    def add(self, trace: BlockTrace) -> None:
        raw = trace.raw[self.name]
        self.before.add(_array(raw))
        if self.after is not None:
            self.after.add(_array(trace.inputs[self.name]))
        if self.codes is not None:
            self.codes.add(_array(trace.codes[self.name]))
        if self.codes_before is not None and self._quantize is not None:
            self.codes_before.add(_array(self._quantize(raw)))

    def result(self) -> TensorDistribution:
        return TensorDistribution(
            self.before.result(),
            None if self.after is None else self.after.result(),
            None if self.codes is None else self.codes.result(),
            None if self.codes_before is None else self.codes_before.result(),
        )


def _code_counter(grid: Grid, x: torch.Tensor) -> CodeCounter:
    return CodeCounter(grid.spec.qn, grid.spec.qp, x.shape[1])


def _comparable(student: list[BlockTrace], teacher: list[BlockTrace]) -> bool:
    """Whether similarity matrices have the same shapes: blocks, heads and tokens."""
    shapes = [[tuple(trace.inputs["q"].shape[:3]) for trace in traces] for traces in (student, teacher)]
    return shapes[0] == shapes[1]


def _array(x: torch.Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().float().cpu().numpy()
