"""The statistics as rows of a result file (`qvit.report_file`): flat objects, each with the ``figure`` it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qvit.analyze.attention_statistics import AttentionStatistics
from qvit.analyze.distributions import Histogram
from qvit.analyze.part_sensitivity import PartSensitivity

Row = dict[str, Any]


def statistics_rows(statistics: Mapping[str, AttentionStatistics], images: int) -> Iterator[Row]:
    """Rows of distributions, distance and similarity; ``role`` is student, teacher or baseline."""
    for role, measured in statistics.items():
        for block, tensors in enumerate(measured.distributions):
            for name, d in tensors.items():
                row: Row = {"figure": "distributions", "role": role, "block": block, "tensor": name, "images": images}
                for suffix, histogram in (("", d.before), ("_rectified", d.after)):
                    if histogram is not None:
                        row |= {
                            f"mean{suffix}": histogram.mean,
                            f"std{suffix}": histogram.std,
                            f"excess_kurtosis{suffix}": histogram.excess_kurtosis,
                        }
                if d.codes_before is not None:
                    row["entropy_without_irm"] = d.codes_before.entropy
                if d.codes is not None:
                    row |= {"entropy": d.codes.entropy, "bits": d.codes.bits}
                yield row
        if measured.distance is not None:
            for block, heads in enumerate(measured.distance):
                for head, value in enumerate(heads):
                    place = {"role": role, "block": block, "head": head, "images": images}
                    pixels = float(value)
                    yield {"figure": "distance", **place, "pixels": None if math.isnan(pixels) else pixels}
        if measured.similarity is not None:
            for name, values in measured.similarity.items():
                for block, heads in enumerate(values):
                    for head, value in enumerate(heads):
                        place = {"role": role, "tensor": name, "block": block, "head": head, "images": images}
                        yield {"figure": "similarity", **place, "distance": float(value)}


def sensitivity_rows(measured: PartSensitivity, images: int, state: str) -> Iterator[Row]:
    """Rows of the sensitivity of parts and layers; ``state`` is ``trained``, or ``calibrated`` where it was not trained."""
    named = {"nothing": measured.none, "everything": measured.all}
    for kind, values in (("reference", named), ("part", measured.parts), ("layer", measured.layers)):
        for name, top1 in values.items():
            yield {
                "figure": "sensitivity",
                "state": state,
                "kind": kind,
                "quantized": name,
                "fake_top1": top1,
                "images": images,
            }


def training_rows(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Row]:
    """The lines of the logs as they are."""
    for role, log in logs.items():
        for line in log:
            yield {"figure": "training", "role": role, **line}


def histograms(statistics: Mapping[str, AttentionStatistics]) -> list[Row]:
    """Histograms and shares of codes, which do not go into flat rows; for the page alone."""
    out: list[Row] = []
    for role, measured in statistics.items():
        for block, tensors in enumerate(measured.distributions):
            for name, d in tensors.items():
                place = {"role": role, "block": block, "tensor": name}
                out += [
                    {**place, "stage": stage, **_bins(histogram)}
                    for stage, histogram in (("before", d.before), ("after", d.after))
                    if histogram is not None
                ]
                if d.codes is not None:
                    counts = d.codes.counts.tolist()
                    out.append({**place, "stage": "codes", "lowest": int(d.codes.levels[0]), "counts_by_head": counts})
    return out


def _bins(histogram: Histogram) -> Row:
    edges = histogram.edges
    return {
        "start": round(float(edges[0]), 6),
        "width": round(float(edges[1] - edges[0]), 8),
        "values": histogram.values,
        "counts": histogram.counts.tolist(),
    }
