"""What the training benchmarks share: the methods that are compared, random images, command lines without folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from qvit.training.models import build_model
from qvit.training.recipe import Recipe

# A recipe may hold what is beyond the paper: the methods of its ablation are without.
_PLAIN = [
    "quant.weight_quantizer=lsq",
    "quant.equalise=true",
    "quant.overrides={}",
    "activations_first.epochs=0",
    "oscillation.weight=0",
    "anneal.share=0",
    "cascade.share=0",
]
# The loss of the paper, in its own weights.
_PAPER = [*_PLAIN, "distill.label=0.5", "distill.hard=0.5", "distill.soft=0", "distill.feature=0", "distill.dgd=1.0"]
SOFT = ["distill.label=0", "distill.hard=0", "distill.soft=1", "distill.feature=0", "distill.dgd=0.1"]
PAPER_METHODS = ("baseline", "irm", "dgd", "qvit")
METHODS: dict[str, list[str]] = {
    "float": ["method=float"],
    "baseline": ["method=baseline", *_PAPER],
    "irm": ["method=irm", *_PAPER],
    "dgd": ["method=dgd", *_PAPER],
    "qvit": ["method=qvit", *_PAPER],
    # What the recipe says, which holds the best that was measured.
    "ours": [],
}
_SOFT = ["method=qvit", *_PLAIN, *SOFT]
_FEATURES = [*_SOFT, "distill.feature=1", "distill.feature_blocks=all"]
_CASCADE = ["cascade.share=0.25", "cascade.bits=4"]
_MIXED = ["data.mixup=0.8", "data.cutmix=1.0"]
_PER_TOKEN = 'quant.overrides={"blocks.*.input": {scale: per_token}}'
_V_PER_HEAD = 'quant.overrides={"blocks.*.attn.v": {scale: per_head, offset: per_head}}'
_GROUPS = 'quant.overrides={{"blocks.*.input": {{scale: per_group_{0}}}, "blocks.*.weight": {{scale: per_group_{0}}}}}'
# One thing each, on top of Q-ViT with soft teacher logits.
VARIANTS: dict[str, list[str]] = METHODS | {
    "soft": _SOFT,
    "soft-no-irm": ["method=dgd", *_PLAIN, *SOFT],
    "soft-no-dgd": ["method=irm", *_PLAIN, *SOFT],
    "statsq": [*_SOFT, "quant.weight_quantizer=statsq"],
    "anneal": [*_SOFT, "anneal.share=0.1"],
    "oscillation": [*_SOFT, "oscillation.weight=0.01"],
    "features": [*_SOFT, "distill.feature=1"],
    "activations-first": [*_SOFT, "activations_first.epochs=2"],
    "features-all": _FEATURES,
    "statsq-anneal": [*_SOFT, "quant.weight_quantizer=statsq", "anneal.share=0.1"],
    "cascade": [*_SOFT, *_CASCADE],
    "no-equalise": [*_SOFT, "quant.equalise=false"],
    "per-token": [*_SOFT, _PER_TOKEN],
    "v-per-head": [*_SOFT, _V_PER_HEAD],
    "groups-64": [*_SOFT, _GROUPS.format(64)],
    "groups-128": [*_SOFT, _GROUPS.format(128)],
    "features-30": [*_FEATURES, "distill.feature=30"],
    "features-30-cascade": [*_FEATURES, "distill.feature=30", *_CASCADE],
}
# The same on top of what the recipe says, for the bits at hand.
VARIANTS |= {
    "ours-no-irm": ["method=dgd"],
    "ours-no-dgd": ["distill.dgd=0"],
    "ours-no-cascade": ["cascade.share=0"],
    "ours-cascade": ["cascade.share=0.25"],
    "ours-no-equalise": ["quant.equalise=false"],
    "ours-statsq": ["quant.weight_quantizer=statsq"],
    "ours-anneal": ["anneal.share=0.1"],
    "ours-oscillation": ["oscillation.weight=0.01"],
    "ours-activations-first": ["activations_first.epochs=2"],
    "ours-mixed": _MIXED,
    "ours-double-lr": ["optim.lr=6.0e-4"],
    "ours-per-token": [_PER_TOKEN],
    "ours-v-per-head": [_V_PER_HEAD],
    "ours-groups-64": [_GROUPS.format(64)],
}
TITLES = {
    "float": "float",
    "baseline": "baseline (LSQ)",
    "irm": "+IRM",
    "dgd": "+DGD",
    "qvit": "Q-ViT (both)",
    "ours": "ours",
    "soft": "Q-ViT, soft logits",
    "soft-no-irm": "soft logits, DGD alone",
    "soft-no-dgd": "soft logits, IRM alone",
    "statsq": "soft + StatsQ weights",
    "anneal": "soft + annealing",
    "oscillation": "soft + oscillation regularisation",
    "features": "soft + feature matching",
    "activations-first": "soft + activations first",
    "features-all": "soft + feature matching, all blocks",
    "statsq-anneal": "soft + StatsQ weights + annealing",
    "cascade": "soft, first a quarter of the epochs at 4 bits",
    "no-equalise": "soft, not equalised",
    "per-token": "soft, inputs scaled per token",
    "v-per-head": "soft, v scaled per head",
    "groups-64": "soft, groups of 64 channels",
    "groups-128": "soft, groups of 128 channels",
    "features-30": "soft + feature matching, all blocks, weight 30",
    "features-30-cascade": "soft + feature matching, all blocks, weight 30, first a quarter of the epochs at 4 bits",
    "ours-no-irm": "ours, without IRM",
    "ours-no-dgd": "ours, without DGD",
    "ours-no-cascade": "ours, without a first stage at 4 bits",
    "ours-cascade": "ours, first a quarter of the epochs at 4 bits",
    "ours-no-equalise": "ours, not equalised",
    "ours-statsq": "ours, StatsQ weights",
    "ours-anneal": "ours + annealing",
    "ours-oscillation": "ours + oscillation regularisation",
    "ours-activations-first": "ours + activations first",
    "ours-mixed": "ours + mixup and cutmix",
    "ours-double-lr": "ours, twice the learning rate",
    "ours-per-token": "ours, inputs scaled per token",
    "ours-v-per-head": "ours, v scaled per head",
    "ours-groups-64": "ours, groups of 64 channels",
}


def public(arguments: Sequence[str]) -> list[str]:
    """A command line without the folders of this machine."""

    def without_folder(part: str) -> str:
        key, equals, value = part.rpartition("=")
        return key + equals + (Path(value).name if "/" in value else value)

    return [without_folder(argument) for argument in arguments]


def short(value: Any) -> Any:
    """A list of paths, or one, without its folders; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(short(item)) for item in value)
    return Path(value).name if isinstance(value, (str, Path)) and "/" in str(value) else value


def settings(row: Mapping[str, Any]) -> tuple[str, int, str, str]:
    """What runs of an ablation that differ in their seed alone share: data, bits, variant, overrides without the seed."""
    overrides = " ".join(part for part in row.get("overrides", "").split() if not part.startswith("seed="))
    return row["data"], row["weight_bits"], row["variant"], overrides


def model_overrides(name: str | None, arguments: str | None) -> list[str]:
    """The recipe's overrides for ``--model`` and ``--model-args``; none where the recipe's own model is kept."""
    if name is None:
        return []
    values = {"name": name, "args": yaml.safe_load(arguments) if arguments else {}}
    return [f"model={yaml.safe_dump(values, default_flow_style=True, width=10**6).strip()}"]


def write_random_images(folder: Path, recipe: Recipe, count: int) -> Path:
    """``folder/<class>/<n>.jpg``: noise of the size and for as many classes as the recipe's model takes; at least ``count``."""
    model, preprocessing = build_model(recipe.model, recipe.data)
    channels, height, width = preprocessing.input_size
    rng = np.random.default_rng(0)
    for number in range(max(count, model.num_classes)):
        label = number % model.num_classes
        pixels = rng.integers(0, 256, (height, width, 3) if channels == 3 else (height, width), dtype=np.uint8)
        place = folder / f"{label:05d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.jpg")
    return folder
