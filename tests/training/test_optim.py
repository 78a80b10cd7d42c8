"""Parameter groups, the optimizer and the schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qvit.errors import RecipeError
from qvit.training.optim import anneal_start, build_optimizer, learning_rate, parameter_groups, set_learning_rate
from qvit.training.sections import AnnealSection, OptimSection, ScheduleSection


def names_of(group: dict, model: nn.Module) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_every_parameter_is_in_one_group_of_its_kind(make_student: Callable[..., nn.Module]) -> None:
    student = make_student(weight_bits=3, act_bits=3)
    groups = parameter_groups(student, weight_decay=0.1, scale_lr_ratio=0.25)
    matrices, others, steps = (names_of(group, student) for group in groups)
    assert matrices | others | steps == {name for name, _ in student.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters()))
    assert all(name.endswith(("_quantizer.scale", "_quantizer.offset")) for name in steps)
    assert "blocks.0.attn.q_quantizer.scale" in steps
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"} <= matrices
    expected = {"pos_embed", "cls_token", "blocks.0.norm1.weight", "head.bias", "blocks.1.attn.rectify_q.weight"}
    assert expected <= others
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0, 0.25]


def test_frozen_parameters_are_left_out(small_vit: Callable[..., nn.Module]) -> None:
    model = small_vit()
    model.pos_embed.requires_grad_(False)
    groups = parameter_groups(model, 0.0, 1.0)
    assert len(groups) == 2
    assert "pos_embed" not in names_of(groups[0], model) | names_of(groups[1], model)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_a_step_moves_every_group_at_its_own_rate(make_student: Callable[..., nn.Module], name: str) -> None:
    student = make_student()
    optimizer = build_optimizer(student, OptimSection(name=name, lr=1e-2, scale_lr_ratio=0.0))
    set_learning_rate(optimizer, 1e-2)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    student(torch.randn(2, 3, 48, 48)).square().sum().backward()
    optimizer.step()
    after = student.state_dict()
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert all(torch.equal(before[key], after[key]) for key in after if "_quantizer." in key)


def test_betas_and_further_arguments_arrive() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimSection(betas=(0.8, 0.7), args={"eps": 1e-5}))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.7)
    assert optimizer.param_groups[0]["eps"] == 1e-5


@pytest.mark.parametrize(
    "section", [OptimSection(name="adamv"), OptimSection(args={"epsilon": 1}), OptimSection(name="sgd", betas=(0.9, 0.9))]
)
def test_an_optimizer_that_timm_cannot_make(section: OptimSection) -> None:
    with pytest.raises(RecipeError, match=section.name) as caught:
        build_optimizer(nn.Linear(2, 2), section)
    assert "\n" not in str(caught.value)


def test_the_schedule_warms_up_and_ends_at_its_least() -> None:
    schedule = ScheduleSection(epochs=10, warmup_epochs=2, min_lr=0.1)
    rates = [learning_rate(step, 5, 1.0, schedule) for step in range(50)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[30] == pytest.approx(0.55)
    assert 0.1 < rates[-1] < 0.102
    assert learning_rate(0, 5, 1.0, ScheduleSection(epochs=1)) == 1.0


def test_annealing_ends_the_cosine_and_keeps_its_last_rate() -> None:
    schedule, anneal = ScheduleSection(epochs=10, warmup_epochs=1, min_lr=0.02), AnnealSection(share=0.2)
    assert anneal_start(5, schedule, anneal) == 40
    rates = [learning_rate(step, 5, 1.0, schedule, anneal) for step in range(50)]
    assert rates[40:] == [0.02] * 10
    assert rates[39] == pytest.approx(0.02, rel=0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[5:41]))
    assert rates[:40] == [learning_rate(step, 5, 1.0, schedule.model_copy(update={"epochs": 8})) for step in range(40)]
    # Nothing would move at a rate of 0.
    assert learning_rate(49, 5, 1.0, ScheduleSection(epochs=10), anneal) == 0.01
    assert anneal_start(5, schedule, AnnealSection()) == 50
    assert learning_rate(49, 5, 1.0, schedule, AnnealSection()) == learning_rate(49, 5, 1.0, schedule)
    assert anneal_start(7, ScheduleSection(epochs=1), AnnealSection(share=0.01)) == 6
