"""Every timm name of the families that qvit speaks of goes the whole road, or is refused with a sentence."""

from __future__ import annotations

import re
from typing import Any

import make_backbones
import pytest
import timm
import torch
import zoo
from backbone_road import RoadError, drive

from qvit.convert import quantize
from qvit.errors import UnsupportedModelError

Survey = tuple[list[zoo.Kind], list[zoo.Refusal]]


@pytest.fixture(scope="module")
def survey() -> Survey:
    return zoo.survey(zoo.names())


@pytest.fixture(scope="module")
def driven(survey: Survey) -> list[str]:
    """What the road of each kind ended in; a `RoadError` of any of them fails every test that asks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of such small models, more are slower
    try:
        return [drive(zoo.tiny(kind.names[0])) for kind in survey[0]]
    finally:
        torch.set_num_threads(threads)


def test_every_name_is_taken_or_refused(survey: Survey) -> None:
    kinds, refusals = survey
    sorted_names = sorted(name for group in (*kinds, *refusals) for name in group.names)
    expected = sorted(name for name in timm.list_models() if re.match(r"(vit|deit3?|swin)_", name))
    assert sorted_names == expected
    assert len(expected) > 200
    taken = {name for kind in kinds for name in kind.names}
    assert len(taken) >= 120
    assert {name for name in expected if name.startswith(("deit", "swin"))} <= taken


def test_every_kind_goes_the_whole_road(survey: Survey, driven: list[str]) -> None:
    assert len(driven) == len(survey[0]) >= 40
    for kind, answer in zip(survey[0], driven, strict=True):
        assert answer == "equal", kind.names[0]


def test_every_refusal_is_a_sentence_that_names_what_is_missing(survey: Survey) -> None:
    for refusal in survey[1]:
        assert "\n" not in refusal.sentence
        assert refusal.sentence.endswith(".")
        assert re.search(r"^[\w.]+ (\(\w+\) )?is not supported: qvit ", refusal.sentence), refusal.sentence
        assert "no integer operations for" in refusal.sentence


def test_a_refused_name_is_refused_by_quantize_too(survey: Survey) -> None:
    for refusal in survey[1]:
        with pytest.raises(UnsupportedModelError, match=re.escape(refusal.sentence)):
            quantize(zoo.tiny(refusal.names[-1], device="meta"), bits=4)


def test_the_committed_page_is_what_the_sweep_gives(survey: Survey, driven: list[str]) -> None:
    written = make_backbones.PAGE.read_text(encoding="utf-8")
    if f"timm {timm.__version__} has" not in written:
        pytest.skip("the page was written with another timm, which knows other names")
    assert written == make_backbones.render(survey[0], driven, survey[1]), "run python benchmarks/make_backbones.py"


def test_the_page_groups_names_and_shows_what_differs() -> None:
    model = zoo.tiny("vit_tiny_patch16_224", device="meta")
    usual, refusals = zoo.survey(
        ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224_miil", "vit_base_mci_224"]
    )
    page = make_backbones.render(usual, ["equal", "It is not supported."], refusals)
    assert "| `vit_tiny_patch16_224`, `vit_small_patch16_224` | 16 x 16 |" in page
    assert "| `vit_base_patch16_224_miil` | 16 x 16 | qkv_bias False | It is not supported. |" in page
    assert "qvit takes 3 of them and refuses 1" in page
    assert "  1: `vit_base_mci_224`" in page
    assert len(model.blocks) == 2


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("vit_base_patch16_clip_quickgelu_224", {"pre_norm": True, "activation": "quick_gelu", "norm_eps": 1e-5}),
        ("deit3_huge_patch14_224", {"layer_scale": True, "no_embed_class": True, "patch_size": (14, 14)}),
        ("vit_huge_patch16_radio_v4", {"reg_tokens": 9, "final_norm": False}),
        ("vit_so400m_patch16_siglip_gap_256", {"class_token": False, "global_pool": "avg", "activation": "gelu_tanh"}),
    ],
)
def test_tiny_models_keep_their_options(name: str, kept: dict[str, Any]) -> None:
    (kind,), _ = zoo.survey([name])
    assert {option: getattr(kind.architecture, option) for option in kept} == kept
    assert sum(parameter.numel() for parameter in zoo.tiny(name).parameters()) < 100_000


@pytest.mark.parametrize("where", ["trained", "compiled"])
def test_the_road_notices_a_difference(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import backbone_road

    freeze, engine = backbone_road.qvit.freeze, backbone_road.CpuEngine

    def moved(student: Any) -> Any:
        model = freeze(student)
        with torch.no_grad():
            student.blocks[1].attn.v_quantizer.offset.add_(0.05)
        return model

    def other(model: Any, threads: int) -> Any:
        scale = model.blocks[0].attention.map.scale
        scale *= 1.5
        try:
            return engine(model, threads)
        finally:
            scale /= 1.5

    if where == "trained":
        monkeypatch.setattr(backbone_road.qvit, "freeze", moved)
    else:
        monkeypatch.setattr(backbone_road, "CpuEngine", other)
    with pytest.raises(RoadError, match="training graph" if where == "trained" else "CPU engine"):
        drive(zoo.tiny("vit_tiny_patch16_224"))
