"""A process that trains: ``run_fit.py RECIPE.yaml OUTPUT``; under a launcher, one of several."""

from __future__ import annotations

import sys

import torch

from qvit.training.engine import fit
from qvit.training.recipe import Recipe

if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(Recipe.load(sys.argv[1]), sys.argv[2], progress=False)
