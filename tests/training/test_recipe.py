"""Recipes: shipped ones are valid, the method decides what it says, mistakes are answered in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvit.errors import QvitError, RecipeError
from qvit.training.recipe import Recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_survives_a_round_trip(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    if recipe.quantized:
        recipe.model_spec()


@pytest.mark.parametrize(
    ("method", "rectify", "dgd"),
    [("baseline", False, 0), ("irm", True, 0), ("dgd", False, 1), ("qvit", True, 1)],
)
def test_the_method_is_one_line(method: str, rectify: bool, dgd: float) -> None:
    recipe = Recipe.from_dict({"method": method})
    assert recipe.model_spec().rectify is rectify
    assert recipe.dgd_weight == dgd


@pytest.mark.parametrize(
    "changes",
    [
        ["quant.weight_quantizer=statsq"],
        ["quant.residual=float16"],
        ["quant.overrides={'blocks.*.weight': {offset: half_step}}"],
        ["quant.start_from=runs/w4a4/last.safetensors"],
        ["quant.budget_mb=9", "quant.budget_bops=4.5e+10", "quant.sensitivities=runs/sensitivities.json"],
        ["anneal.share=0.1", "anneal.width=0.005"],
        ["oscillation.weight=0.01", "oscillation.start=0.25"],
        ["activations_first.epochs=1", "activations_first.feature=1"],
        ["distill.feature=1", "distill.feature_blocks=last"],
        ["distill.dgd=0", "distill.feature=0", "distill.cached_crops=4"],
    ],
)
def test_every_lever_is_a_line_or_two_on_a_shipped_recipe(changes: list[str]) -> None:
    recipe = Recipe.load("imagenette", ["quant.bits=2", *changes])
    assert recipe != Recipe.load("imagenette", ["quant.bits=2"])
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.model_spec().weight_bits == 2


def test_an_explicit_rectify_wins_over_the_method() -> None:
    recipe = Recipe.from_dict({"method": "qvit", "quant": {"rectify": False}})
    assert recipe.model_spec().rectify is False
    assert recipe.dgd_weight == 1


@pytest.mark.parametrize(("method", "weight"), [("baseline", 0), ("irm", 0), ("dgd", 0.25), ("qvit", 0.25)])
def test_the_weight_of_dgd_counts_where_the_method_has_it(method: str, weight: float) -> None:
    assert Recipe.from_dict({"method": method, "distill": {"dgd": 0.25}}).dgd_weight == weight


def test_bits_stand_for_weights_and_activations() -> None:
    spec = Recipe.from_dict({"quant": {"bits": 3, "act_bits": 4, "overrides": {"*.mlp.fc2": 8}}}).model_spec()
    assert (spec.weight_bits, spec.act_bits, spec.edge_bits) == (3, 4, 8)
    assert spec.overrides == {"*.mlp.fc2": 8}


def test_overrides_are_dotted_and_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: baseline\noptim: {lr: 1e-3}\n")
    recipe = Recipe.load(path, ["quant.bits=2", "data.augment.scale=[0.5, 1]", "model.name=deit_tiny_patch16_224", "seed=7"])
    assert recipe.quant.bits == 2
    assert recipe.data.augment.scale == (0.5, 1.0)
    assert recipe.model is not None
    assert recipe.model.name == "deit_tiny_patch16_224"
    assert (recipe.seed, recipe.optim.lr) == (7, 1e-3)
    assert recipe.override("quant.bits=3").quant.bits == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim": {"zebra": 1}}, ["'optim.zebra'", "keys here are name, lr"]),
        ({"optim": {"wieght_decay": 1}}, ["'optim.wieght_decay'", "did you mean 'optim.weight_decay'"]),
        ({"batchsize": 1}, ["'batchsize'", "did you mean 'batch_size'"]),
        ({"data": {"augment": {"hflop": 1}}}, ["did you mean 'data.augment.hflip'"]),
        ({"quant": {"bits": 9}}, ["quant.bits=9", "at least 2 and at most 8"]),
        ({"quant": {"act_bits": 1}}, ["quant.act_bits=1", "at least 2 and at most 8"]),
        ({"data": {"augment": {"scale": [0, 1]}}}, ["data.augment.scale.0=0", "more than 0 and at most 1"]),
        ({"data": {"label_smoothing": 1}}, ["at least 0 and less than 1"]),
        ({"optim": {"lr": 0}}, ["optim.lr=0", "more than 0"]),
        ({"optim": {"lr": float("nan")}}, ["optim.lr=nan"]),
        ({"optim": {"lr": 1e39}}, ["optim.lr=1e+39", "more than 0 and at most 1e+06"]),
        ({"distill": {"dgd": 1e300}}, ["distill.dgd=1e+300", "at least 0 and at most 1e+06"]),
        ({"quant": {"weight_quantiser": "lsq"}}, ["did you mean 'quant.weight_quantizer'"]),
        ({"quant": {"budget_mb": -1}}, ["quant.budget_mb=-1", "more than 0"]),
        ({"quant": {"budget": 1}}, ["'quant.budget'", "did you mean 'quant.budget_mb'"]),
        ({"quant": {"sensitivities": "s.json"}}, ["quant.sensitivities belongs to a budget"]),
        ({"quant": {"weight_quantizer": "magic"}}, ["quant.weight_quantizer='magic'", "statsq"]),
        ({"quant": {"residual": "bfloat16"}}, ["quant.residual='bfloat16'", "float16"]),
        ({"anneal": {"share": 1}}, ["anneal.share=1", "at least 0 and less than 1"]),
        ({"anneal": {"width": 0.7}}, ["anneal.width=0.7", "more than 0 and at most 0.5"]),
        ({"anneal": {"shore": 0.1}}, ["did you mean 'anneal.share'"]),
        ({"oscillation": {"weight": -1}}, ["oscillation.weight=-1", "at least 0 and at most 1e+06"]),
        ({"oscillation": {"begin": 0.5}}, ["'oscillation.begin'", "keys here are weight, start"]),
        ({"activations_first": {"epochs": -1}}, ["activations_first.epochs=-1", "at least 0"]),
        ({"activation_first": {"epochs": 1}}, ["did you mean 'activations_first'"]),
        ({"distill": {"cached_crops": -1}}, ["distill.cached_crops=-1", "at least 0 and at most 1024"]),
        ({"distill": {"cached_crop": 2}}, ["did you mean 'distill.cached_crops'"]),
        ({"distill": {"feature_blocks": "some"}}, ["distill.feature_blocks='some'", "'last', 'thirds' or 'all'"]),
        ({"needs_gpus": True}, ["did you mean 'needs_gpu'"]),
        ({"schedule": {"epochs": 0}}, ["schedule.epochs=0", "at least 1"]),
        ({"schedule": {"epochs": 1, "warmup_epochs": 2}}, ["warmup_epochs", "more than schedule.epochs (1)"]),
        ({"schedule": {"min_lr": 1.0}}, ["min_lr", "more than optim.lr"]),
        ({"data": {"augment": {"scale": [0.9, 0.5]}}}, ["data.augment.scale", "smaller number first"]),
        ({"data": {"interpolation": "best"}}, ["data.interpolation='best'", "bicubic"]),
        ({"data": {"val": 3}}, ["data.val=3"]),
        ({"method": "magic"}, ["method='magic'", "baseline"]),
        ({"model": {}}, ["model does not say which model it is", "set model.name"]),
        ({"teacher": {"args": {"depth": 2}, "checkpoint": "t.safetensors"}}, ["teacher.args belongs to", "set teacher.name"]),
        ({"model": {"pretrained": True, "checkpoint": "m.safetensors"}}, ["model.pretrained belongs to", "set model.name"]),
        ({"batch_size": 3, "data": {"mixup": 0.8}}, ["batch_size is 3", "even"]),
        ({"quant": {"overrides": {"*.fc1": "four"}}}, ["quant.overrides.*.fc1='four'"]),
    ],
)
def test_a_mistake_is_one_sentence(values: dict, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(values)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert message[-1] in ".?"


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ("no_such_recipe", [], "digits"),
        ("no/such/file.yaml", [], "No such file"),
        ("digits", ["quant.bits"], "key=value"),
        ("digits", ["=2"], "key=value"),
        ("digits", ["batch_size.x=2"], "has no keys"),
        ("digits", ["quant.bits=[2"], "no valid YAML"),
        ("digits", ["quant.bits=1"], "at least 2"),
    ],
)
def test_loading_mistakes(source: str, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.load(source, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "\x00"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        Recipe.load(path)


def test_an_override_with_an_unknown_field_is_refused() -> None:
    recipe = Recipe.from_dict({"quant": {"overrides": {"*.input": {"scael": "per_tensor"}}}})
    with pytest.raises(QvitError, match="scael"):
        recipe.model_spec()
