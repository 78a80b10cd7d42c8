"""Float models from a recipe: timm's, with weights from timm, a state dict or a checkpoint."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from qvit.convert import preprocessing_of
from qvit.errors import RecipeError, WeightsError
from qvit.layers.blocks import transformer_blocks
from qvit.preprocessing import Preprocessing
from qvit.training.checkpoint import is_checkpoint, load_model, read_checkpoint
from qvit.training.sections import DataSection, ModelSection

_WRAPPERS = ("model", "state_dict", "model_state")  # keys under which published files hold their state dict
_SHOWN = 5


def build_model(section: ModelSection, data: DataSection) -> tuple[nn.Module, Preprocessing]:
    """A float model and the preprocessing of its images.

    The preprocessing is the one in the checkpoint, if it is one of this package, else timm's; ``data`` may change it.

    Raises:
        RecipeError: timm has no such model, or it does not take the arguments, or nothing says which model it is.
        WeightsError: the weights cannot be downloaded or read, or do not fit.
    """
    if section.name is None:
        model, own = _described(section.checkpoint)
        return model, adjusted(own, data)
    try:
        model = timm.create_model(section.name, pretrained=section.pretrained, **section.args)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError, ArithmeticError, LookupError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        if section.pretrained and isinstance(error, OSError):
            raise WeightsError(
                f"timm's pretrained weights of {section.name!r} cannot be loaded ({message}): check the network, or name a "
                "file of weights as the checkpoint."
            ) from None
        if not timm.is_model(section.name):
            raise RecipeError(_unknown(section.name)) from None
        raise RecipeError(f"timm cannot make the model {_shown(section)}: {message}.") from None
    preprocessing = None
    if section.checkpoint is not None:
        if is_checkpoint(section.checkpoint):
            preprocessing = read_checkpoint(section.checkpoint).metadata.preprocessing
        load_weights(model, section.checkpoint)
    preprocessing = preprocessing or preprocessing_of(model)
    _check_shape(model, _shown(section))
    return model, adjusted(preprocessing, data)


def _shown(section: ModelSection) -> str:
    return f"{section.name!r} with {section.args}" if section.args else repr(section.name)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=1)
    known = f"did you mean {near[0]!r}?" if near else "timm.list_models() has them all."
    return f"timm has no model {name!r}: {known}"


def _check_shape(model: Any, what: str) -> None:
    """Raises `RecipeError` for a model that timm makes and that cannot run."""
    blocks: list[Any] = transformer_blocks(model)
    sizes = {
        "blocks": len(blocks),
        "heads": min((block.attn.num_heads for block in blocks), default=1),
        "whole patch in its images": model.patch_embed.num_patches,
    }
    for name, size in sizes.items():
        if size < 1:
            raise RecipeError(f"The model {what} has no {name}: change the arguments.")


def _described(path: Path | None) -> tuple[nn.Module, Preprocessing]:
    """The float model that a checkpoint of this package describes and holds."""
    if path is None or (path.exists() and not is_checkpoint(path)):
        raise RecipeError(f"{path or 'The recipe'} does not say which model it belongs to: set its name in the recipe as well.")
    model, metadata = load_model(path)
    if metadata.student is not None:
        raise WeightsError(f"{path} holds a quantized model: use a float one.")
    return model, metadata.preprocessing


def top1_of(section: ModelSection) -> float | None:
    """The top-1, in percent, that the section's weights say they reached; only a checkpoint of this package says so."""
    if section.checkpoint is None or not is_checkpoint(section.checkpoint):
        return None
    return read_checkpoint(section.checkpoint).metadata.metrics.get("top1")


def adjusted(preprocessing: Preprocessing, data: DataSection) -> Preprocessing:
    """The preprocessing with what the recipe changes."""
    names = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    return replace(preprocessing, **{name: getattr(data, name) for name in names if getattr(data, name) is not None})


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict into a float model.

    Args:
        model: float, of the architecture that the weights belong to.
        path: ``.safetensors`` (a state dict or a checkpoint of this package), or a PyTorch file of tensors alone.

    Raises:
        WeightsError: the file cannot be read, or misses or adds tensors, or has some of another shape.
    """
    state = read_state_dict(Path(path))
    own = model.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"misses {_listed(missing)}")
    if unexpected := [name for name in state if name not in own]:
        problems.append(f"adds {_listed(unexpected)}")
    if other := [name for name in own if name in state and state[name].shape != own[name].shape]:
        shapes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in other]
        problems.append(f"has other shapes of {_listed(shapes)}")
    if problems:
        raise WeightsError(f"The weights in {path} do not fit the model: the file {' and '.join(problems)}.")
    model.load_state_dict(state)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file; see `load_weights`."""
    if is_checkpoint(path):
        checkpoint = read_checkpoint(path)
        if checkpoint.metadata.student is not None:
            raise WeightsError(f"{path} holds a quantized model: use a float one.")
        return checkpoint.model_state()
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"There is no file of weights {path}: check the path.") from None
    except pickle.UnpicklingError:
        raise WeightsError(f"{path} is damaged, or holds objects that are not tensors: export its state dict alone.") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as weights ({' '.join(str(error).split())}).") from None
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no state dict of tensors.")
    return dict(content)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
