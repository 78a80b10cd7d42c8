"""Every variant is a recipe that differs from the plain one in what its name says."""

from __future__ import annotations

import digits_levers
import pytest

from qvit.training.recipe import Recipe


@pytest.mark.parametrize("name", digits_levers.VARIANTS)
def test_every_variant_is_a_recipe_of_its_own(name: str) -> None:
    recipes = {n: Recipe.load("digits", [*digits_levers.COMMON, *changes]) for n, changes in digits_levers.VARIANTS.items()}
    assert sum(recipe == recipes[name] for recipe in recipes.values()) == 1
    assert recipes[name].model_spec().weight_bits == 2


def test_files_are_named_without_their_folders() -> None:
    assert digits_levers._public(["--work", "/a/b", "--seeds", "1"]) == ["--work", "b", "--seeds", "1"]
