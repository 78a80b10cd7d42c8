"""Which constants go where: norms in front of and behind pooling, what a model does not have, and every layer once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import constants as c
from qvit.engines.cuda.model_constants import ModelConstants
from qvit.integer import ops
from qvit.integer.model import IntegerModel
from tests.engines import cases

Factory = Callable[..., Any]
CPU = torch.device("cpu")
# architecture -> norm of every token, norm between pooling and another norm, norm in front of the heads' codes
NORMS: dict[str, tuple[str | None, str | None, str | None]] = {
    "distilled": (None, None, "norm"),
    "average of patches, class token": (None, None, "fc_norm"),
    "average without fc_norm": ("norm", None, None),
    "average with prefix": (None, None, "fc_norm"),
}


@pytest.fixture
def freeze(make_student: Factory, small_vit: Factory, perturb: Factory) -> Callable[..., IntegerModel]:
    def make(architecture: str = "", **options: Any) -> IntegerModel:
        name, own = cases.ARCHITECTURES.get(architecture, ("vit_tiny_patch16_224", {}))
        return qvit.freeze(perturb(make_student(small_vit(name, **cases.SMALL | {"depth": 1} | own | options))))

    return make


@pytest.mark.parametrize("architecture", NORMS)
def test_norms_around_pooling(architecture: str, freeze: Callable[..., IntegerModel]) -> None:
    model = freeze(architecture)
    found = ModelConstants.of(model, CPU)

    def is_of(constants: Any, name: str | None) -> bool:
        if name is None:
            return constants is None or isinstance(constants, c.CodeConstants)
        return isinstance(constants, c.NormConstants) and torch.equal(
            constants.weight, torch.from_numpy(getattr(model, name).weight)
        )

    tokens, between, heads = NORMS[architecture]
    assert is_of(found.norm, tokens)
    assert is_of(found.pooled_norm, between)
    assert len(found.heads) == len(model.heads)
    for (norm, layer), head in zip(found.heads, model.heads, strict=True):
        assert is_of(norm, heads)
        assert (layer.m, layer.k) == head.weight.shape
    # Norms behind which no codes come give floats.
    assert all(norm is None or norm.codes is None for norm in (found.norm, found.pooled_norm, found.norm_pre))


def test_a_norm_before_and_one_behind_pooling(freeze: Callable[..., IntegerModel]) -> None:
    """timm makes none with both, but the format holds such a model; of pooled tokens alone where one token is pooled."""
    for architecture in ("", "average of patches, class token"):
        model = freeze(architecture)
        norms = [ops.LayerNorm(torch.rand(24).numpy(), torch.rand(24).numpy(), 1e-6) for _ in range(2)]
        found = ModelConstants.of(replace(model, norm=norms[0], fc_norm=norms[1]), CPU)
        before, other = (found.norm, found.pooled_norm) if architecture else (found.pooled_norm, found.norm)
        assert other is None
        assert before is not None
        assert torch.equal(before.weight, torch.from_numpy(norms[0].weight))
        ((behind, _),) = found.heads
        assert isinstance(behind, c.NormConstants)
        assert torch.equal(behind.weight, torch.from_numpy(norms[1].weight))


def test_what_a_vit_may_not_have(freeze: Callable[..., IntegerModel]) -> None:
    plain = ModelConstants.of(freeze(), CPU)
    assert plain.norm_pre is None
    assert plain.merging == (None,)
    assert plain.embed is not None
    (block,) = plain.blocks
    assert (block["windows"], block["ls1"], block["ls2"]) == (None, None, None)
    model = freeze("LayerScale")
    (block,) = ModelConstants.of(model, CPU).blocks
    assert torch.equal(block["ls1"], torch.from_numpy(model.blocks[0].ls1))
    assert not torch.equal(block["ls1"], block["ls2"])
    norm_pre = ModelConstants.of(freeze("norm before the blocks"), CPU).norm_pre
    assert norm_pre is not None


def test_codes_behind_each_layer_are_the_next_ones(freeze: Callable[..., IntegerModel]) -> None:
    model = freeze()
    (block,), (made,) = model.blocks, ModelConstants.of(model, CPU).blocks
    width, hidden = model.architecture.embed_dim, block.fc2.weight.shape[1]
    for key, layer, count in (("proj_codes", block.proj, width), ("fc2_codes", block.fc2, hidden)):
        assert torch.allclose(made[key].step[:count], torch.from_numpy(layer.input.scale))
        assert (made[key].step[count:] == 1).all()
        assert (made[key].low, made[key].high) == (layer.input.spec.qn, layer.input.spec.qp)
    for key, norm, layer in (("norm1", block.norm1, block.qkv), ("norm2", block.norm2, block.fc1)):
        assert torch.equal(made[key].weight, torch.from_numpy(norm.weight))
        assert torch.allclose(made[key].codes.step[:width], torch.from_numpy(layer.input.scale))


def test_a_swins_stages_and_windows(frozen_swin: IntegerModel) -> None:
    found = ModelConstants.of(frozen_swin, CPU)
    assert found.embed is None
    first, second = found.merging
    assert first is None
    assert second is not None
    assert (second[1].m, second[1].k) == frozen_swin.stages[1].merging.reduction.weight.shape  # type: ignore[union-attr]
    assert second[0].codes is not None
    assert len(found.blocks) == 3
    assert [block["windows"].regions is not None for block in found.blocks] == [False, True, False]
    assert found.norm is not None
    assert isinstance(found.heads[0][0], c.CodeConstants)
