"""Units: they cover every point of the blocks once, and their patterns match nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from qvit.analyze.products import products_of, specs_of
from qvit.analyze.units import units_of, widths_of, with_widths
from qvit.convert import quantize
from qvit.families import vit
from qvit.layers.points import quantization_points
from qvit.spec import ModelSpec, PerToken, matches

from .shapes import swin_shape, timm_model


@pytest.fixture(params=["deit_small_distilled_patch16_224", "swin_tiny_patch4_window7_224"])
def architecture(request: pytest.FixtureRequest) -> Any:
    model = timm_model(request.param)
    return swin_shape(model) if "swin" in request.param else vit.describe(model)


def test_every_point_of_the_blocks_is_in_one_unit(architecture: Any) -> None:
    products = products_of(architecture)
    units = units_of(products)
    names = [point for product in products for point in product.points]
    inner = [point for product in products if not product.edge for point in product.points]
    assert sorted(point for unit in units for point in unit.points) == sorted(inner)
    for unit in units:
        assert sorted(name for name in names if any(matches(p, name) for p in unit.patterns)) == sorted(unit.points)
    assert len({unit.name for unit in units}) == len(units)


def test_units_of_a_vit() -> None:
    units = units_of(products_of(vit.describe(timm_model("deit_tiny_patch16_224", depth=1))))
    assert [unit.name.removeprefix("blocks.0.") for unit in units] == [
        *("attn.qkv", "attn.attention", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert units[1].products == ("blocks.0.attn.scores", "blocks.0.attn.values")
    assert [point.rpartition(".")[2] for point in units[1].points] == ["q", "k", "map", "v"]


def test_widths_reach_the_model(small_vit: Any) -> None:
    model = small_vit()
    products = products_of(vit.describe(model))
    units = units_of(products)
    widths = {unit.name: (2, 3, 4, 8)[index % 4] for index, unit in enumerate(units)}
    widths |= {units[-1].name: 4, units[-2].name: 4}
    spec = with_widths(ModelSpec(edge_bits=7), units, widths)
    student = quantize(model, spec=spec)
    points = quantization_points(student)
    for unit in units:
        assert {points[name].spec.bits for name in unit.points} == {widths[unit.name]}
    assert points["head.weight"].spec.bits == points["patch_embed.proj.weight"].spec.bits == 7
    assert {name: point.spec for name, point in points.items()} == specs_of(products, spec)
    # The most common width needs no override.
    assert (spec.weight_bits, spec.act_bits) == (4, 4)
    assert 4 not in spec.overrides.values()
    assert ModelSpec.from_dict(spec.to_dict()) == spec


def test_widths_of_a_spec() -> None:
    products = products_of(vit.describe(timm_model("deit_tiny_patch16_224", depth=1)))
    units = units_of(products)
    widths = dict(zip((unit.name for unit in units), (2, 3, 4, 8, 3), strict=True))
    assert widths_of(units, specs_of(products, with_widths(ModelSpec(), units, widths))) == widths
    # Widths that only an override makes unequal are all named.
    spec = with_widths(ModelSpec(overrides={"*.map": 8, "*.fc2.weight": 2}), units, widths)
    changed = {"blocks.0.attn.attention": "3 and 8", "blocks.0.mlp.fc2": "2 and 3"}
    assert widths_of(units, specs_of(products, spec)) == widths | changed


def test_overrides_of_the_user_win() -> None:
    units = units_of(products_of(vit.describe(timm_model("deit_tiny_patch16_224", depth=2))))
    own = {
        "*.fc2": 5,
        "blocks.0.mlp.fc1": {"scale": "per_token", "offset": "none"},
        "blocks.1.attn.proj": 6,
    }
    widths = dict.fromkeys((unit.name for unit in units), 3) | {"blocks.0.mlp.fc1": 8, "blocks.1.attn.proj": 2}
    own_inputs = {**own, "blocks.0.mlp.fc1.weight": {"scale": "per_channel"}}
    del own_inputs["blocks.0.mlp.fc1"]
    spec = with_widths(ModelSpec(overrides={**own_inputs, "blocks.0.mlp.fc1.input": {"scale": "per_token"}}), units, widths)
    specs = specs_of(products_of(vit.describe(timm_model("deit_tiny_patch16_224", depth=2))), spec)
    assert specs["blocks.0.mlp.fc2.weight"].bits == specs["blocks.1.mlp.fc2.input"].bits == 5
    assert specs["blocks.1.attn.proj.weight"].bits == 6
    assert specs["blocks.0.mlp.fc1.input"].bits == specs["blocks.0.mlp.fc1.weight"].bits == 8
    assert specs["blocks.0.mlp.fc1.input"].scale == PerToken()
    # The very pattern of a unit, with fields but without bits, keeps the unit's width.
    same = with_widths(ModelSpec(overrides={"blocks.0.attn.map": {"scale": "per_token"}}), units, {
        **widths, "blocks.0.attn.attention": 2
    })  # fmt: skip
    assert same.overrides["blocks.0.attn.map"] == {"bits": 2, "scale": "per_token"}
    assert same.overrides["blocks.0.attn.[qkv]"] == 2


@pytest.mark.parametrize(
    ("own", "weight", "inputs"),
    [
        ({"*.fc1": 8, "blocks.0.mlp.fc1": {"offset": "none"}}, 8, 8),
        ({"*.weight": 8, "blocks.0.mlp.fc1": {"offset": "none"}}, 8, 2),
        ({"*.input": 8, "blocks.0.mlp.fc1.input": {"scale": "per_token"}}, 2, 8),
        ({"*.input": 8, "blocks.0.mlp.fc1": {"offset": "none"}, "blocks.0.mlp.fc1.input": {"scale": "per_token"}}, 2, 8),
        ({"blocks.0.mlp.fc1": {"offset": "none"}}, 2, 2),
        ({"blocks.0.mlp.fc1": {"bits": 7}, "blocks.0.mlp.fc1.weight": {"scale": "per_channel"}}, 7, 7),
        ({"blocks.0.mlp.fc1": 6}, 6, 6),
    ],
)
def test_bits_of_the_user_win_where_a_unit_has_other_overrides_too(own: dict[str, Any], weight: int, inputs: int) -> None:
    products = products_of(vit.describe(timm_model("deit_tiny_patch16_224", depth=2)))
    units = units_of(products)
    widths = dict.fromkeys((unit.name for unit in units), 4) | {"blocks.0.mlp.fc1": 2}
    specs = specs_of(products, with_widths(ModelSpec(overrides=own), units, widths))
    assert (specs["blocks.0.mlp.fc1.weight"].bits, specs["blocks.0.mlp.fc1.input"].bits) == (weight, inputs)
    offsets = [change["offset"] for change in own.values() if isinstance(change, dict) and "offset" in change]
    assert (specs["blocks.0.mlp.fc1.input"].offset is None) == bool(offsets)
