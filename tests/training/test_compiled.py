"""Compiled blocks: the same training up to rounding, the same checkpoints, nothing compiled but steps, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from qvit.errors import TrainingError
from qvit.layers.blocks import transformer_blocks
from qvit.training.checkpoint import LAST
from qvit.training.compiled import CompiledBlocks
from qvit.training.engine import fit
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.recipe import Recipe

from .helpers import interrupt_at_step
from .test_engine import RANDOM, SWIN, metrics, same_tensors

MakeRecipe = Callable[..., Recipe]
SOFT = {"label": 0.5, "hard": 0, "soft": 1, "feature": 1, "feature_blocks": "thirds"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are taken and differentiated as ever, but run without the C++ compiler, which takes seconds a graph."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def teacher(depth: int = 3) -> nn.Module:
    torch.manual_seed(7)
    args = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 32, "depth": depth, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **args).eval()


def same_training(a: Path, b: Path, digits: float = 1e-4) -> None:
    """The losses of every step, the weights and the optimizer's state of two runs, but for rounding."""
    losses = [[row["loss"] for row in metrics(run, "train")] for run in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=digits)
    first, second = (safetensors.torch.load_file(run / LAST) for run in (a, b))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=10 * digits, atol=10 * digits)


def test_a_float_step_is_the_same_but_for_rounding(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(method="float", schedule={"epochs": 1})
    fit(recipe.override("compile=true"), tmp_path / "a", progress=False)
    assert graphs() == 1  # one for both blocks, and none for the evaluation
    fit(recipe, tmp_path / "b", progress=False)
    assert graphs() == 1
    same_training(tmp_path / "a", tmp_path / "b")


@pytest.mark.usefixtures("_traced_only")
def test_student_and_teacher_are_compiled_once_a_shape(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(method="float", distill=SOFT, schedule={"epochs": 2})
    taught = teacher()
    result = fit(recipe.override("compile=true"), tmp_path / "a", teacher=taught, progress=False)
    assert graphs() == 2
    assert not any("forward" in part.__dict__ for model in (result.model, taught) for part in model.modules())
    fit(recipe, tmp_path / "b", teacher=teacher(), progress=False)
    same_training(tmp_path / "a", tmp_path / "b")


@pytest.mark.usefixtures("_traced_only")
def test_it_resumes_with_the_same_bits(tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(method="float", distill=SOFT, schedule={"epochs": 2}, compile=True, **RANDOM)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 7)
        with pytest.raises(TrainingInterrupted):
            fit(recipe, tmp_path / "a", teacher=teacher(), progress=False)
    with pytest.raises(TrainingError, match="was started with compile=True, now it is False"):
        fit(recipe.override("compile=false"), tmp_path / "a", teacher=teacher(), resume=True, progress=False)
    fit(recipe, tmp_path / "a", teacher=teacher(), resume=True, progress=False)
    fit(recipe, tmp_path / "b", teacher=teacher(), progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)


@pytest.mark.usefixtures("_traced_only")
@pytest.mark.parametrize("residual", ["float32", "float16"])
def test_a_quantized_student_is_compiled_around_its_kernels(residual: str, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """With taps in the attention of both, and with weights that join later."""
    distill = {"soft": 1, "dgd": 0.1, "feature": 1, "feature_blocks": "all"}
    quant = {"residual": residual}
    recipe = tiny_recipe(quant=quant, distill=distill, activations_first={"epochs": 1}, schedule={"epochs": 2})
    fit(recipe.override("compile=true"), tmp_path / "a", progress=False)
    # norm1 | residual, norm2 | residual; the teacher's MLP is one with its residuals
    assert graphs() == 3 + 2
    fit(recipe, tmp_path / "b", progress=False)
    same_training(tmp_path / "a", tmp_path / "b", digits=1e-3)


@pytest.mark.usefixtures("_traced_only")
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_swin_has_a_graph_for_each_shape_and_shift(rate: float) -> None:
    torch.manual_seed(0)
    args = SWIN | {"depths": [2, 2], "drop_path_rate": rate}
    model: Any = timm.create_model("swin_tiny_patch4_window7_224", **args)
    plain = copy.deepcopy(model)
    images = torch.randn(2, 3, 8, 8)
    compiled = CompiledBlocks(model, None)
    with compiled.attached(), compiled.running():
        for part in (model, plain):
            torch.manual_seed(1)
            part(images).square().sum().backward()
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=name)
    # The second stage's map is one window: there nothing shifts. With stochastic depth each block has a rate of its own.
    assert graphs() == (3 if rate == 0 else 4)


@pytest.mark.usefixtures("_traced_only")
def test_what_attentions_kernels_are_given_is_compiled_once(
    make_student: Callable[..., Any], small_vit: Callable[..., Any]
) -> None:
    student = make_student(small_vit(depth=3))
    attentions = [block.attn for block in student.blocks]

    def columns() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        student.zero_grad()
        given = [attention.columns() for attention in attentions]
        torch.stack(given).square().sum().backward()
        return given, [p.grad.clone() for p in student.parameters() if p.grad is not None]

    plain = columns()
    compiled = CompiledBlocks(student)
    with compiled.attached(), compiled.running():
        fast = columns()
    assert graphs() == 1
    for own, other in zip(plain, fast, strict=True):
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a, b)
    assert not any("columns" in attention.__dict__ for attention in attentions)


def test_disabled_it_touches_nothing() -> None:
    model = teacher()
    compiled = CompiledBlocks(model, enabled=False)
    with compiled.attached(), compiled.running():
        assert not any("forward" in block.__dict__ for block in transformer_blocks(model))
        model(torch.zeros(1, 3, 8, 8))
    assert graphs() == 0


def test_it_says_where_it_cannot_compile(tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no compiler\nand many lines more")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    recipe = tiny_recipe(method="float", compile=True)
    with pytest.raises(TrainingError, match=r"cannot be compiled here \(no compiler\): set compile=false"):
        fit(recipe, tmp_path, progress=False)
