"""Checkpoints: one safetensors file each, described by JSON in its header; never a pickle.

Tensors are called ``model.<state dict key>`` and, in a checkpoint that training resumes from, ``optimizer.state.<parameter
number>.<key>`` and ``optimizer.group.<group number>.<key>``; the optimizer's plain numbers are in the header. The teacher's
cached logits are ``targets.<key>``, the linear maps of feature matching ``projector.<state dict key>``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from qvit.architecture import Architecture, architecture_from_dict
from qvit.convert import StudentInfo, build, family_of, rebuild
from qvit.errors import QvitError, TrainingError, WeightsError
from qvit.files import write_atomically
from qvit.preprocessing import Preprocessing

LAST, BEST = "last.safetensors", "best.safetensors"
PROJECTOR = "projector."
SCHEMA = 1
_HEADER = "qvit.checkpoint"


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says of itself.

    Attributes:
        architecture: of the model.
        preprocessing: what its inputs go through.
        student: how it is quantized; ``None`` for a float model.
        classes: names, in the order of the model's outputs.
        recipe: as a JSON object (`qvit.training.recipe.Recipe.to_dict`).
        epochs: finished ones.
        step: optimizer steps done.
        processes: that train together.
        metrics: accuracies in percent and the like.
        versions: of the libraries that wrote it.
    """

    architecture: Architecture
    preprocessing: Preprocessing
    student: StudentInfo | None
    classes: list[str]
    recipe: dict[str, Any]
    epochs: int = 0
    step: int = 0
    processes: int = 1
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {"torch": str(torch.__version__), "timm": timm.__version__})

    @classmethod
    def of(
        cls, model: nn.Module, preprocessing: Preprocessing, classes: list[str], recipe: dict[str, Any], **values: Any
    ) -> Metadata:
        """For a model that is here; a student brings its own description."""
        student: StudentInfo | None = getattr(model, "qvit", None)
        architecture = student.architecture if student else family_of(model).describe(model)
        return cls(architecture, preprocessing, student, classes, recipe, **values)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return {
            "schema": SCHEMA,
            "architecture": self.architecture.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
            "student": self.student.to_dict() if self.student else None,
            "classes": self.classes,
            "recipe": self.recipe,
            "epochs": self.epochs,
            "step": self.step,
            "processes": self.processes,
            "metrics": self.metrics,
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Metadata:
        """Reads what `to_dict` wrote; raises `KeyError`, `TypeError` or a `QvitError` where that fails."""
        return cls(
            architecture=architecture_from_dict(data["architecture"]),
            preprocessing=Preprocessing.from_dict(data["preprocessing"]),
            student=StudentInfo.from_dict(data["student"]) if data["student"] else None,
            **{name: data[name] for name in ("classes", "recipe", "epochs", "step", "processes", "metrics", "versions")},
        )


def save_checkpoint(
    path: Path,
    model: nn.Module,
    metadata: Metadata,
    optimizer: torch.optim.Optimizer | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a checkpoint beside ``path`` and then puts it in its place at once; ``more``: further tensors to keep.

    Raises:
        InputError: the file cannot be written; what was at ``path`` before is still there.
    """
    snapshot(path, model, metadata, optimizer, more)()


def snapshot(
    path: Path,
    model: nn.Module,
    metadata: Metadata,
    optimizer: torch.optim.Optimizer | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
) -> Callable[[], None]:
    """Copies to the host what `save_checkpoint` would write, and returns what writes it, now or later, here or on a thread."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= more or {}
    header: dict[str, Any] = metadata.to_dict()
    if optimizer is not None:
        header["optimizer"], state = _pack_optimizer(optimizer)
        tensors |= state
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = {_HEADER: json.dumps(header)}
    return lambda: write_atomically(path, safetensors.torch.save(copies, text))


def _pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The optimizer's state as JSON and tensors."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {"state": {}, "group": {}}
    for kind, entries in (("state", state["state"].items()), ("group", enumerate(state["param_groups"]))):
        for number, entry in entries:
            values = {key: value for key, value in entry.items() if key != "params"}
            plain[kind][str(number)] = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
            tensors |= {f"optimizer.{kind}.{number}.{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
    return plain, tensors


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Restores an optimizer over the same parameters from a checkpoint that was written with one.

    Raises:
        TrainingError: the checkpoint's optimizer has other parameter groups, or it has none.
    """
    own = optimizer.state_dict()
    plain = checkpoint.optimizer
    if plain is None or len(plain["group"]) != len(own["param_groups"]):
        raise TrainingError(f"{checkpoint.path} holds no state of this run's optimizer: start a new run.")
    state: dict[int, dict[str, Any]] = {int(number): dict(entry) for number, entry in plain["state"].items()}
    for index, group in enumerate(own["param_groups"]):
        saved = plain["group"][str(index)]
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("optimizer."):
            _, kind, number, key = name.split(".", 3)
            target = own["param_groups"][int(number)] if kind == "group" else state[int(number)]
            target[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read.

    Attributes:
        path: of the file.
        metadata: what it says of itself.
        tensors: all of them, by the names that the file gives them.
        optimizer: the optimizer's plain numbers; ``None`` where it was saved without.
    """

    path: Path
    metadata: Metadata
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None

    def model_state(self) -> dict[str, torch.Tensor]:
        """The model's state dict."""
        return self._state("model.")

    def projector_state(self) -> dict[str, torch.Tensor]:
        """The state dict of what learned beside a float model (`qvit.distill.projection`)."""
        return self._state(PROJECTOR)

    def _state(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def is_checkpoint(path: Path) -> bool:
    """Whether the file at ``path`` is a checkpoint of this package, rather than any other file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return _HEADER in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        WeightsError: there is no such file, or it is truncated, damaged, foreign or of a newer version.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            if text is None:
                raise WeightsError(f"{path} is no checkpoint of qvit: it was written by another program.")
            header = json.loads(text)
            if header["schema"] > SCHEMA:
                raise WeightsError(f"{path} was written by a newer version of qvit: update qvit to read it.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            return Checkpoint(path, Metadata.from_dict(header), tensors, header.get("optimizer"))
    except WeightsError:
        raise
    except FileNotFoundError:
        raise WeightsError(f"There is no checkpoint {path}: check the path.") from None
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, QvitError) as error:
        raise WeightsError(f"{path} cannot be read as a checkpoint ({error}): it is truncated or damaged, or none.") from None


def load_model(path: str | Path) -> tuple[nn.Module, Metadata]:
    """The model of a checkpoint, float or quantized, in evaluation mode on the CPU.

    Raises:
        WeightsError: the file cannot be read, or its tensors do not fit the model that it describes.
    """
    checkpoint = read_checkpoint(path)
    metadata = checkpoint.metadata
    try:
        model = rebuild(metadata.student) if metadata.student else build(metadata.architecture)
        model.load_state_dict(checkpoint.model_state())
    except (RuntimeError, QvitError) as error:
        raise WeightsError(f"{path} is damaged: its tensors do not fit the model it describes ({_short(error)}).") from None
    return model.eval(), metadata


def load_student(path: str | Path) -> tuple[nn.Module, Metadata]:
    """The quantized model of a checkpoint, as `load_model`.

    Raises:
        WeightsError: as `load_model`, or the checkpoint holds a float model.
    """
    model, metadata = load_model(path)
    if metadata.student is None:
        raise WeightsError(f"{path} holds a float model, not a quantized one: quantize and train it first.")
    return model, metadata


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + " .."
