"""Experiments: every variant is a recipe that can be made, files are found, names tell settings apart."""

from __future__ import annotations

import io
import json
import lzma
import shlex
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import timm
from experiments import DATA_SETS, Bench, Experiment
from harness import TITLES, VARIANTS

import qvit
from qvit.errors import InputError
from qvit.training.recipe import Recipe

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "float"])
@pytest.mark.parametrize("data", DATA_SETS)
def test_every_variant_is_a_recipe_whose_model_can_be_made(data: str, variant: str) -> None:
    recipe = Recipe.load(DATA_SETS[data].recipe, Experiment(data, variant, 3, 5).changes)
    assert (recipe.quant.bits, recipe.seed) == (3, 5)
    assert variant in TITLES
    if data == "imagenette":
        model = timm.create_model("vit_small_patch16_224", depth=1, **(recipe.model.args if recipe.model else {}))
        assert qvit.quantize(model, spec=recipe.model_spec()).qvit.spec.weight_bits == 3


@pytest.mark.parametrize("data", [name for name, of in DATA_SETS.items() if of.float_recipe])
def test_a_float_model_is_the_one_that_students_start_from(data: str) -> None:
    parent = Recipe.load(DATA_SETS[data].float_recipe or "", Experiment(data, "float", 32, 0).changes)
    student = Recipe.load(DATA_SETS[data].recipe, Experiment(data, "ours", 2, 0).changes)
    assert parent.method == "float"
    assert parent.model is not None
    assert student.model is not None
    assert (student.model.name, student.model.args.get("num_classes")) == (
        parent.model.name,
        parent.model.args.get("num_classes"),
    )


def test_the_papers_methods_are_without_what_is_beyond_the_paper() -> None:
    beyond = ["quant.weight_quantizer=statsq", "anneal.share=0.1", "oscillation.weight=0.01", "activations_first.epochs=1"]
    plain = Recipe.load("imagenette", ["method=qvit"])
    for method in ("baseline", "irm", "dgd", "qvit"):
        recipe = Recipe.load("imagenette", [*beyond, *VARIANTS[method]])
        assert recipe.method == method
        assert (recipe.quant, recipe.anneal, recipe.oscillation) == (
            plain.quant,
            type(recipe.anneal)(),
            type(recipe.oscillation)(),
        )
        assert recipe.activations_first.epochs == 0
        assert (recipe.distill.label, recipe.distill.hard, recipe.distill.soft, recipe.distill.dgd) == (0.5, 0.5, 0, 1)


@pytest.mark.parametrize(
    "file", sorted(RESULTS.glob("ablation-*.json")) + sorted(RESULTS.glob("mixed-*.json")), ids=lambda p: p.stem
)
def test_the_commands_of_committed_rows_still_mean_what_was_measured(file: Path) -> None:
    """Defaults of a recipe may change; a row's command then has to name what they were."""
    for row in json.loads(file.read_text())["rows"]:
        words = shlex.split(row["command"])
        changes = [change for flag, change in pairwise(words) if flag == "--set"]
        assert (words[:3], " ".join(changes)) == (["qvit", "train", row["recipe"]], row["overrides"])
        recipe = Recipe.load(row["recipe"], changes)
        assert (recipe.schedule.epochs, recipe.batch_size, recipe.seed) == (row["epochs"], row["batch"], row["seed"])
        assert recipe == recipe.override(*VARIANTS[row["variant"]]), f"{words[-1]} is not {row['variant']}"
        if row["variant"] != "float":
            assert (recipe.quant.bits, recipe.model.name if recipe.model else None) == (row["weight_bits"], row["model"])
        if row["variant"] != "ours":
            assert recipe.method == row["method"]


def test_names_and_commands_tell_experiments_apart() -> None:
    experiments = [
        Experiment("imagenette", "ours", 2, 0),
        Experiment("imagenette", "ours", 2, 1),
        Experiment("imagenette", "ours", 2, 0, ("optim.lr=1e-3",)),
        Experiment("imagenette", "qvit", 2, 0),
        Experiment("cifar10", "ours", 2, 0),
        Experiment("cifar10", "float", 32, 0),
        Experiment("imagenette-swin-tiny", "float", 32, 0),
    ]
    assert len({e.name() for e in experiments}) == len(experiments)
    assert len({e.command() for e in experiments}) == len(experiments)
    command = experiments[2].command()
    assert command.startswith("qvit train imagenette --train-data imagenette224-train-0.tar --train-data imagenette224-train-1")
    assert "--checkpoint vit_small_patch14_224_imagenette.safetensors" in command
    assert "--set optim.lr=1e-3" in command
    assert "--checkpoint" not in experiments[5].command()
    assert "--teacher" not in experiments[5].command()
    assert "--teacher vit_small_patch14_224_imagenette.safetensors" in experiments[6].command()


def test_packed_files_are_unpacked_once(tmp_path: Path) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    data.mkdir()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("train/x/0.jpg"), io.BytesIO())
    (data / "cifar10.tar.xz").write_bytes(lzma.compress(content.getvalue()))
    bench = Bench(data, runs, 0)
    path = bench.located("cifar10.tar")
    assert path.read_bytes() == content.getvalue()
    stamp = path.stat().st_mtime_ns
    assert bench.located("cifar10.tar").stat().st_mtime_ns == stamp
    assert bench.recipe(Experiment("cifar10", "ours", 4, 0)).data.train == str(path)
    with pytest.raises(InputError, match=r"nor nothing\.tar\.xz"):
        bench.located("nothing.tar")


def test_files_are_those_of_the_data_folder(tmp_path: Path) -> None:
    for name in ("imagenette224-train-0.tar", "imagenette224-train-1.tar", "imagenette224-val.tar"):
        (tmp_path / name).touch()
    recipe = Bench(tmp_path, tmp_path / "runs", 3).recipe(Experiment("imagenette", "irm", 3, 1))
    assert recipe.data.train == [str(tmp_path / f"imagenette224-train-{i}.tar") for i in range(2)]
    assert recipe.data.val == str(tmp_path / "imagenette224-val.tar")
    assert recipe.model is not None
    assert recipe.model.checkpoint == tmp_path / "vit_small_patch14_224_imagenette.safetensors"
    assert recipe.data.workers == 3
    (tmp_path / "vit_small_patch14_224_imagenette.safetensors").touch()
    parent = Bench(tmp_path, tmp_path / "runs", 3).recipe(Experiment("imagenette-deit-tiny", "float", 32, 1))
    assert parent.teacher is not None
    assert parent.teacher.checkpoint == tmp_path / "vit_small_patch14_224_imagenette.safetensors"
