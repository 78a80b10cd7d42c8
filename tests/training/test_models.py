"""Float models from a recipe, and the weights that fit them or do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from qvit.errors import RecipeError, WeightsError
from qvit.preprocessing import Preprocessing
from qvit.training.checkpoint import Metadata, save_checkpoint
from qvit.training.models import build_model, load_weights
from qvit.training.sections import DataSection, ModelSection

ARGS = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 48, "num_classes": 7}
NAME = "deit_tiny_patch16_224"


def section(path: Path | None = None) -> ModelSection:
    return ModelSection(name=NAME, args=ARGS, checkpoint=path)


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_a_pytorch_file_with_or_without_wrapper(
    small_vit: Callable[..., nn.Module], tmp_path: Path, wrapper: str | None
) -> None:
    state = small_vit().state_dict()
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pth")
    model, _ = build_model(section(tmp_path / "w.pth"), DataSection())
    assert same(model, state)


def test_half_precision_safetensors(small_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in small_vit().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    model, preprocessing = build_model(section(tmp_path / "w.safetensors"), DataSection(crop_pct=1.0, mean=[0.5] * 3))
    assert model.head.weight.dtype == torch.float32
    assert same(model, {name: tensor.float() for name, tensor in state.items()})
    assert (preprocessing.input_size, preprocessing.crop_pct, preprocessing.mean) == ((3, 48, 48), 1.0, (0.5, 0.5, 0.5))
    assert preprocessing.std == (0.229, 0.224, 0.225)


def test_a_checkpoint_brings_its_preprocessing(small_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = small_vit()
    own = Preprocessing((3, 48, 48), 0.7, "squash", "lanczos", (0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
    save_checkpoint(tmp_path / "c.safetensors", model, Metadata.of(model, own, ["x"] * 7, {}))
    again, preprocessing = build_model(section(tmp_path / "c.safetensors"), DataSection(interpolation="bilinear"))
    assert same(again, model.state_dict())
    assert preprocessing == Preprocessing((3, 48, 48), 0.7, "squash", "bilinear", own.mean, own.std)


def test_a_checkpoint_says_which_model_it_holds(
    small_vit: Callable[..., nn.Module], make_student: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model, student = small_vit(), make_student()
    own = Preprocessing((3, 48, 48), mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1))
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("float", "quantized", "state", "absent")}
    save_checkpoint(paths["float"], model, Metadata.of(model, own, ["x"] * 7, {}))
    save_checkpoint(paths["quantized"], student, Metadata.of(student, student.qvit.preprocessing, ["x"] * 7, {}))
    safetensors.torch.save_file(model.state_dict(), paths["state"])
    again, preprocessing = build_model(ModelSection(checkpoint=paths["float"]), DataSection(crop_pct=1.0))
    assert same(again, model.state_dict())
    assert (preprocessing.mean, preprocessing.crop_pct) == (own.mean, 1.0)
    for name, error, words in (
        ("quantized", WeightsError, "holds a quantized model: use a float one"),
        ("state", RecipeError, "does not say which model it belongs to: set its name"),
        ("absent", WeightsError, "There is no checkpoint"),
    ):
        with pytest.raises(error, match=words):
            build_model(ModelSection(checkpoint=paths[name]), DataSection())


def test_a_quantized_checkpoint_is_no_float_model(make_student: Callable[..., nn.Module], tmp_path: Path) -> None:
    student = make_student()
    path = tmp_path / "s.safetensors"
    save_checkpoint(path, student, Metadata.of(student, student.qvit.preprocessing, ["x"] * 7, {}))
    with pytest.raises(WeightsError, match="quantized"):
        build_model(section(path), DataSection())


def test_what_does_not_fit_is_named(small_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    state = small_vit().state_dict()
    del state["head.bias"]
    state["extra"] = torch.ones(1)
    state["head.weight"] = torch.ones(3, 48)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        load_weights(small_vit(), tmp_path / "w.pth")
    message = str(caught.value)
    for words in ("misses head.bias", "adds extra", "head.weight (3, 48) for (7, 48)"):
        assert words in message
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"cls_token, pos_embed.* and \d+ more and adds module\."):
        load_weights(small_vit(), tmp_path / "w.pth")


class Payload:
    """Would run a command if it were unpickled."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, ("exit 1",)


def test_objects_are_not_unpickled(small_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch.save({"model": Payload()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="not tensors") as caught:
        load_weights(small_vit(), tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_files_that_hold_no_weights(small_vit: Callable[..., nn.Module], tmp_path: Path, name: str) -> None:
    for content in (b"", b"garbage of some length", b"PK\x03\x04 garbage"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=r"damaged|cannot be read") as caught:
            load_weights(small_vit(), tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="no file of weights"):
        load_weights(small_vit(), tmp_path / f"absent_{name}")
    torch.save({"epoch": 3}, tmp_path / "n.pth")
    with pytest.raises(WeightsError, match="no state dict"):
        load_weights(small_vit(), tmp_path / "n.pth")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"depth": 0}, "has no blocks"),
        ({"num_heads": -1}, "has no heads"),
        ({"num_heads": 0}, "cannot make the model"),
        ({"img_size": 8}, "has no whole patch in its images"),
        ({"img_size": []}, "cannot make the model"),
        ({"patch_size": 0}, "cannot make the model"),
    ],
)
def test_a_model_that_could_not_run(args: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        build_model(ModelSection(name=NAME, args=ARGS | args), DataSection())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [ModelSection(name="deit_smal"), ModelSection(name=NAME, args={"depht": 3})])
def test_a_model_that_timm_does_not_make(bad: ModelSection) -> None:
    with pytest.raises(RecipeError, match=str(bad.name)) as caught:
        build_model(bad, DataSection())
    assert "\n" not in str(caught.value)


def test_pretrained_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_arguments: object, **_options: object) -> None:
        raise FileNotFoundError("no network.")

    monkeypatch.setattr(timm, "create_model", unreachable)
    pretrained = ModelSection(name=NAME, args={}, pretrained=True)
    with pytest.raises(
        WeightsError, match=r"^timm's pretrained weights of .* cannot be loaded \(no network\): check the network"
    ):
        build_model(pretrained, DataSection())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deit_tiny_patch16_22", r"^timm has no model 'deit_tiny_patch16_22': did you mean 'deit_tiny_patch16_224'\?$"),
        ("no such thing at all", r"^timm has no model 'no such thing at all': timm.list_models\(\) has them all\.$"),
    ],
)
def test_a_name_that_timm_does_not_know(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build_model(ModelSection(name=name), DataSection())


def test_arguments_are_shown_only_where_there_are_some() -> None:
    with pytest.raises(RecipeError, match=rf"^timm cannot make the model '{NAME}' with {{'num_heads': 0}}: "):
        build_model(ModelSection(name=NAME, args={"num_heads": 0}), DataSection())
