"""Budgets: the real file keeps them to the byte, plans are the best ones, mixed models run in every engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.analyze.budget import Budget, file_template, plan_within
from qvit.analyze.cost import model_cost
from qvit.analyze.file_size import file_bytes
from qvit.analyze.unit_sensitivity import Sensitivities, measure_sensitivities
from qvit.engines import default_engine
from qvit.errors import BudgetError, InputError, SpecError
from qvit.integer.model import IntegerModel
from qvit.layers.points import quantization_points
from qvit.spec import ModelSpec

OPTIONS: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
FACTS = {"data": "noise", "note": "x" * 200}


@pytest.fixture(scope="module")
def model(small_vit: Callable[..., Any]) -> Any:
    torch.manual_seed(5)
    return small_vit("vit_tiny_patch16_224", **OPTIONS)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(6)) * 2 - 1


@pytest.fixture(scope="module")
def sensitivities(model: Any, images: torch.Tensor) -> Sensitivities:
    return measure_sensitivities(model, [images], images=16)


@pytest.fixture(scope="module")
def template(model: Any, images: torch.Tensor) -> IntegerModel:
    return file_template(model, [images], provenance=FACTS, images=16)


def _frozen(model: Any, spec: ModelSpec, images: torch.Tensor) -> IntegerModel:
    student = qvit.quantize(model, spec=spec).eval()
    qvit.calibrate(student, [images], images=16)
    return qvit.freeze(student, provenance=FACTS)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_size_of_a_file_is_known_before_it_is_made(
    model: Any, images: torch.Tensor, template: IntegerModel, bits: int, tmp_path: Path
) -> None:
    frozen = _frozen(model, ModelSpec.of_bits(bits), images)
    assert 0 <= file_bytes(template, frozen.specs) - frozen.save(tmp_path / "m.qvit") <= 24


def test_scales_that_float16_does_not_hold_are_allowed_for(model: Any, images: torch.Tensor, tmp_path: Path) -> None:
    import copy

    tiny = copy.deepcopy(model)
    with torch.no_grad():
        tiny.blocks[0].mlp.fc2.weight.mul_(1e-3)
    template = file_template(tiny, [images], provenance=FACTS, images=16)
    assert template.tensors["blocks.0.mlp.fc2.weight_scale"].dtype == np.float32
    frozen = _frozen(tiny, ModelSpec.of_bits(2), images)
    size = frozen.save(tmp_path / "m.qvit")
    # Two bytes a channel more than at 8 bits at most.
    assert 0 <= file_bytes(template, frozen.specs) - size <= 24 + 2 * 32


def test_every_budget_is_kept_by_the_real_file(
    model: Any, images: torch.Tensor, sensitivities: Sensitivities, template: IntegerModel, tmp_path: Path
) -> None:
    least = plan_within(Budget(file_bytes=10**9, bit_operations=None), sensitivities, template)
    assert set(least.widths.values()) == {8}
    two, eight = (file_bytes(template, _frozen(model, ModelSpec.of_bits(b), images).specs) for b in (2, 8))
    damages = []
    for limit in np.linspace(two, eight, 6).astype(int).tolist():
        plan = plan_within(Budget(file_bytes=limit), sensitivities, template)
        frozen = _frozen(model, plan.spec, images)
        path = tmp_path / f"{limit}.qvit"
        frozen.save(path)
        assert path.stat().st_size <= plan.file_bytes <= limit
        assert model_cost(frozen.architecture, frozen.specs).bit_operations == plan.bit_operations
        assert plan.damage == pytest.approx(sum(sensitivities.damages[u][b] for u, b in plan.widths.items()))
        # Attention has no weights: bytes alone leave it alone.
        assert {bits for unit, bits in plan.widths.items() if unit.endswith("attention")} == {8}
        damages.append(plan.damage)
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > damages[2] > damages[-1]


def test_no_other_choice_is_better(sensitivities: Sensitivities, template: IntegerModel, model: Any) -> None:
    """All choices of four units' widths, the others' damages made so large that they stay at 8 bits."""
    free = ["blocks.0.attn.qkv", "blocks.0.attn.attention", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    damages = {
        unit: dict(widths) if unit in free else {bits: 0.0 if bits == 8 else 1e6 for bits in widths}
        for unit, widths in sensitivities.damages.items()
    }
    fixed = replace(sensitivities, damages=damages)
    everything = plan_within(Budget(file_bytes=10**9), fixed, template)
    limits = Budget(everything.file_bytes - 5000, everything.bit_operations * 85 // 100)
    plan = plan_within(limits, fixed, template)
    assert plan.file_bytes <= limits.file_bytes  # type: ignore[operator]
    assert plan.bit_operations <= limits.bit_operations  # type: ignore[operator]
    from qvit.analyze.products import products_of, specs_of
    from qvit.analyze.units import units_of, with_widths

    products = products_of(template.architecture)
    units = units_of(products)
    best = float("inf")
    for combination in itertools.product(fixed.widths, repeat=4):
        widths = dict.fromkeys(damages, 8) | dict(zip(free, combination, strict=True))
        specs = specs_of(products, with_widths(ModelSpec(), units, widths))
        within = file_bytes(template, specs) <= limits.file_bytes  # type: ignore[operator]
        if within and model_cost(template.architecture, specs).bit_operations <= limits.bit_operations:  # type: ignore[operator]
            best = min(best, sum(damages[unit][bits] for unit, bits in widths.items()))
    assert plan.damage == pytest.approx(best, rel=1e-9)


def test_a_limit_of_bit_operations(sensitivities: Sensitivities, template: IntegerModel) -> None:
    wide = plan_within(Budget(bit_operations=10**15), sensitivities, template)
    for share in (30, 50, 80):
        limit = wide.bit_operations * share // 100
        plan = plan_within(Budget(bit_operations=limit), sensitivities, template)
        assert plan.bit_operations <= limit
        assert plan.damage > wide.damage
        assert len(set(plan.widths.values())) > 1


def test_impossible_budgets_say_the_smallest_that_is_possible(sensitivities: Sensitivities, template: IntegerModel) -> None:
    with pytest.raises(BudgetError, match=r"A file of 0.001 MB cannot be met: the smallest .* is 0\.0\d\d MB") as caught:
        plan_within(Budget(file_bytes=1000), sensitivities, template)
    # Which is one that can be met.
    text = str(caught.value)
    possible = Budget.of(float(text.split(" is ")[1].split(" MB")[0]), None)
    assert possible is not None
    assert plan_within(possible, sensitivities, template).file_bytes <= possible.file_bytes  # type: ignore[operator]
    exactly = int(text.split("(")[1].split(" bytes")[0].replace(",", ""))
    narrowest = plan_within(Budget(exactly), sensitivities, template)
    assert {bits for unit, bits in narrowest.widths.items() if not unit.endswith("attention")} == {2}
    with pytest.raises(BudgetError, match="cannot be met"):
        plan_within(Budget(exactly - 1), sensitivities, template)
    with pytest.raises(
        BudgetError, match=r"1,000 bit operations an image cannot be met: the fewest .* with 2 bits in every block\.$"
    ) as caught:
        plan_within(Budget(bit_operations=1000), sensitivities, template)
    fewest = int(str(caught.value).split(" are ")[1].split(", with")[0].replace(",", ""))
    assert set(plan_within(Budget(exactly, fewest), sensitivities, template).widths.values()) == {2}
    with pytest.raises(BudgetError, match="bit operations"):
        plan_within(Budget(exactly, fewest - 1), sensitivities, template)


def test_budgets_of_options() -> None:
    assert Budget.of(None, None) is None
    assert Budget.of(0.011, None) == Budget(11_000, None)
    assert Budget.of(2.3, 7.5e10) == Budget(2_300_000, 75_000_000_000)
    for megabytes, operations in ((0.0, None), (-1.0, None), (float("nan"), None), (None, float("inf")), (1.0, 0.0)):
        with pytest.raises(BudgetError, match="give a positive number"):
            Budget.of(megabytes, operations)


def test_overrides_and_other_models(sensitivities: Sensitivities, template: IntegerModel, model: Any) -> None:
    spec = ModelSpec(overrides={"*.fc2": 6})
    plan = plan_within(Budget(file_bytes=template_size(template) * 7 // 10), sensitivities, template, spec)
    student = qvit.quantize(model, spec=plan.spec)
    assert quantization_points(student)["blocks.1.mlp.fc2.weight"].spec.bits == 6
    with pytest.raises(BudgetError, match=r"with 2 bits in every block, overrides apart\.$"):
        plan_within(Budget(file_bytes=1000), sensitivities, template, spec)
    with pytest.raises(SpecError, match="matches no layer"):
        plan_within(Budget(10**9), sensitivities, template, ModelSpec(overrides={"*.fc3": 6}))
    with pytest.raises(InputError, match=r"measured with rectify=True, not False"):
        plan_within(Budget(10**9), sensitivities, template, ModelSpec(rectify=False))
    with pytest.raises(InputError, match="of another model"):
        plan_within(Budget(10**9), replace(sensitivities, model="deit_tiny_patch16_224"), template)
    fewer = {unit: damages for unit, damages in sensitivities.damages.items() if not unit.startswith("blocks.1")}
    with pytest.raises(InputError, match="of another model"):
        plan_within(Budget(10**9), replace(sensitivities, damages=fewer), template)


def template_size(template: IntegerModel) -> int:
    return file_bytes(template, template.specs)


def test_a_mixed_model_runs_in_the_cpu_engine(
    model: Any, images: torch.Tensor, sensitivities: Sensitivities, template: IntegerModel, tmp_path: Path
) -> None:
    if default_engine() != "cpu":
        pytest.skip("the CPU engine is not built")
    wide = plan_within(Budget(bit_operations=10**15), sensitivities, template)
    limits = Budget(wide.file_bytes * 6 // 10, wide.bit_operations * 25 // 100)
    plan = plan_within(limits, sensitivities, template)
    widths = set(plan.widths.values())
    assert len(widths) >= 3
    path = tmp_path / "mixed.qvit"
    _frozen(model, plan.spec, images).save(path)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 1, 8, 8), dtype=np.uint8)
    reference, cpu = (qvit.load(path, engine=engine)(pixels) for engine in ("reference", "cpu"))
    assert np.array_equal(reference, cpu)
