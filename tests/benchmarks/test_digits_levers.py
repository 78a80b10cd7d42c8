"""Every variant is a recipe that differs from the plain one in what its name says."""

from __future__ import annotations

from pathlib import Path

import digits_levers
import pytest

from qvit.training.cascade import cascade_stages
from qvit.training.recipe import Recipe


@pytest.mark.parametrize("name", digits_levers.VARIANTS)
def test_every_variant_is_a_recipe_of_its_own(name: str) -> None:
    recipes = {n: Recipe.load("digits", [*digits_levers.COMMON, *changes]) for n, changes in digits_levers.VARIANTS.items()}
    assert sum(recipe == recipes[name] for recipe in recipes.values()) == 1
    assert recipes[name].model_spec().weight_bits == 2
    assert recipes[name].schedule.epochs == 5


def test_the_cascade_has_the_stages_that_its_name_says() -> None:
    name = "cascade, 2 of 5 epochs at 4 bits"
    recipe = Recipe.load("digits", [*digits_levers.COMMON, *digits_levers.VARIANTS[name]])
    assert recipe.cascades
    first, second = cascade_stages(recipe, Path("run"))
    assert (first.schedule.epochs, first.model_spec().weight_bits, first.model_spec().act_bits) == (2, 4, 4)
    assert (second.schedule.epochs, second.model_spec().weight_bits, second.model_spec().act_bits) == (3, 2, 2)


def test_files_are_named_without_their_folders() -> None:
    assert digits_levers._public(["--work", "/a/b", "--seeds", "1"]) == ["--work", "b", "--seeds", "1"]
