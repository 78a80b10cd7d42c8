"""Figures of attention: what is drawn for whom, and what is said where there is nothing to draw."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from qvit.analyze.attention_statistics import AttentionStatistics, TensorDistribution
from qvit.analyze.distributions import CodeCounter, HistogramCounter
from qvit.analyze.report.attention_figures import distance_section, maps_section, similarity_section
from qvit.analyze.report.distribution_figures import distribution_section
from qvit.analyze.report.rows import histograms, statistics_rows

TITLES = {"teacher": "float teacher", "baseline": "baseline W2A2", "student": "Q-ViT W2A2"}


def _distribution(codes: bool, rectified: bool) -> TensorDistribution:
    counter, coded = HistogramCounter(), CodeCounter(-2, 1, heads=3)
    counter.add(np.random.default_rng(0).standard_normal(500))
    coded.add(np.random.default_rng(0).integers(-2, 2, (4, 3, 5, 2)))
    histogram, shares = counter.result(), coded.result()
    irm = rectified and codes
    return TensorDistribution(histogram, histogram if irm else None, shares if codes else None, shares if irm else None)


def _statistics(
    role: str, blocks: int = 2, distance: bool = True, similarity: bool = True, irm: bool = True
) -> AttentionStatistics:
    one = _distribution(role != "teacher", irm and role != "baseline")
    grid = np.arange(3.0 * blocks).reshape(blocks, 3) + 1
    return AttentionStatistics(
        distributions=[{"q": one, "k": one}] * blocks,
        distance=grid if distance else None,
        uniform=4.0 if distance else None,
        skipped=0.25 if role == "student" else 0.0,
        similarity={"q": grid / 10, "k": grid / 20} if similarity and role != "teacher" else None,
    )


def test_distance() -> None:
    statistics = {role: _statistics(role) for role in TITLES}
    statistics["student"].distance[0, 1] = np.nan  # type: ignore[index]
    section = distance_section(statistics, TITLES, 7)
    assert [panel.id for panel in section.panels] == [f"distance-{n}" for n in ("means", "teacher", "baseline", "student")]
    assert "Q-ViT W2A2: 2.0, 5.0 pixels by block" in section.panels[-1].description
    assert "7 images" in section.caption
    assert "25.0 % in Q-ViT W2A2" in section.caption
    assert section.table is not None
    assert section.table.rows[1] == ["1", "5.00", "5.00", "5.00", *["4.00, 5.00, 6.00"] * 3]
    alone = distance_section({"student": _statistics("student")}, TITLES, 7)
    assert [panel.id for panel in alone.panels] == ["distance-student"]


def test_distance_without_a_grid_says_so() -> None:
    section = distance_section({"student": _statistics("student", distance=False)}, TITLES, 7)
    assert section.empty
    assert "one grid of patches" in section.missing[0]


def test_similarity() -> None:
    section = similarity_section({role: _statistics(role) for role in TITLES}, TITLES, 7, "")
    assert [panel.id for panel in section.panels] == ["similarity-q", "similarity-k"]
    assert section.table is not None
    assert section.table.rows[0] == ["0", "0.200", "0.100", "0.200", "0.100"]
    lonely = {"student": _statistics("student", similarity=False)}
    assert similarity_section(lonely, TITLES, 7, "No teacher, because.").missing == ["No teacher, because."]
    lonely["teacher"] = _statistics("teacher")
    assert "other blocks, heads or tokens" in similarity_section(lonely, TITLES, 7, "").missing[0]


@pytest.mark.parametrize("irm", [True, False])
def test_distributions(irm: bool) -> None:
    statistics = {"teacher": _statistics("teacher"), "student": _statistics("student", irm=irm)}
    section = distribution_section(statistics, TITLES, 7)
    stages = ["teacher", "before", "after", "codes"] if irm else ["teacher", "before", "codes"]
    expected = [f"distributions-1-{name}-{stage}" for name in "qk" for stage in stages]
    assert [panel.id for panel in section.groups[1].panels] == expected
    assert [panel.id for panel in section.panels] == ["entropy-q", "entropy-k"]
    assert ("no IRM" in section.caption) != irm
    entropy = statistics["student"].distributions[0]["q"].codes.entropy  # type: ignore[union-attr]
    assert f"{entropy:.2f} of 2 bits" in section.groups[0].panels[-1].svg
    assert section.table is not None
    assert len(section.table.rows) == 4
    assert len({len(section.table.columns), *map(len, section.table.rows)}) == 1
    assert section.table.rows[0][-1] == f"{entropy:.3f}"


def _decoded(source: str) -> np.ndarray:
    kind, _, data = source.partition(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_maps_align_with_their_images() -> None:
    rng = np.random.default_rng(0)
    maps = {"teacher": rng.random((2, 3, 4, 5)), "student": np.zeros((2, 3, 4, 5)), "baseline": None}
    maps["student"][1, 2, 3, 4] = 0.125  # type: ignore[index]
    pixels = rng.integers(0, 256, (2, 3, 8, 10), dtype=np.uint8)
    section = maps_section(maps, pixels, ["cat", "dog"], TITLES)
    images = section.strips[0].pictures
    assert [picture.caption for picture in images] == ["cat", "dog"]
    np.testing.assert_array_equal(_decoded(images[1].source), pixels[1].transpose(1, 2, 0))
    assert (len(section.groups), section.chosen) == (3, 2)
    teacher, student = section.groups[2].strips
    assert (teacher.label, student.label) == ("float teacher", "Q-ViT W2A2")
    assert student.pictures[1].caption == "12.5\u00a0%"
    heat = _decoded(student.pictures[1].source)
    assert heat.shape == (4, 5, 3)
    assert heat[3, 4].sum() > heat[0, 0].sum()
    assert (heat[:3] == heat[0, 0]).all()
    assert section.missing == ["baseline W2A2 has no class token over one grid of patches."]
    assert maps_section({"student": None}, pixels, ["a", "b"], TITLES).empty


def test_photographs_are_stored_once_and_as_jpeg() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 96, 64), dtype=np.uint8)
    section = maps_section({"student": np.ones((1, 12, 4, 4))}, pixels, ["x"], TITLES)
    (image,) = section.strips[0].pictures
    assert image.source.startswith("data:image/jpeg")
    assert not image.coarse
    assert _decoded(image.source).shape == (96, 64)


def test_rows_are_flat_and_complete() -> None:
    statistics = {role: _statistics(role) for role in TITLES}
    statistics["student"].distance[0, 1] = np.nan  # type: ignore[index]
    rows = list(statistics_rows(statistics, 7))
    assert all(isinstance(value, (int, float, str, type(None))) for row in rows for value in row.values())
    count = {figure: sum(row["figure"] == figure for row in rows) for figure in ("distributions", "distance", "similarity")}
    assert count == {"distributions": 3 * 2 * 2, "distance": 3 * 2 * 3, "similarity": 2 * 2 * 2 * 3}
    assert [row for row in rows if row["figure"] == "distance" and row["pixels"] is None] == [
        {"figure": "distance", "role": "student", "block": 0, "head": 1, "images": 7, "pixels": None}
    ]
    stages = [entry["stage"] for entry in histograms(statistics)]
    assert (stages.count("before"), stages.count("after"), stages.count("codes")) == (12, 4, 8)
