"""The whole road of one tiny model: converted, calibrated, trained for a step, rebuilt, frozen, run by engines, compared."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import torch
from torch import nn

import qvit
from qvit.convert import StudentInfo, rebuild
from qvit.distill import DistillationLoss, tap_queries_keys
from qvit.engines.cpu import CpuEngine
from qvit.engines.reference import ReferenceEngine
from qvit.errors import UnsupportedModelError
from qvit.layers.points import record_codes

_BITS = 4
_IMAGES = 4


class RoadError(AssertionError):
    """A step of the road did not give what it must; the message says which."""


def drive(model: nn.Module, seed: int = 0) -> str:
    """Takes a float model down the road, all its parameters made random first; the model itself changes.

    Returns:
        ``equal`` where the CPU engine gives the reference's codes and logits, bit for bit; else the sentence with which it
        refuses the model.

    Raises:
        RoadError: a step failed: no finite loss, a parameter that did not learn, another function when rebuilt, or codes or
            logits that differ between training graph, reference engine and CPU engine.
    """
    generator = torch.Generator().manual_seed(seed)
    _randomise(model, generator)
    model.eval()
    student = qvit.quantize(model, bits=_BITS)
    preprocessing = student.qvit.preprocessing
    pixels = torch.randint(0, 256, (_IMAGES, *preprocessing.input_size), generator=generator, dtype=torch.uint8).numpy()
    images = torch.from_numpy(preprocessing.normalise(pixels))
    qvit.calibrate(student, [images], images=_IMAGES)
    _train_one_step(student, model, images)
    _rebuild(student, images)
    return _compare(student, images)


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Values that a trained model might have: timm's own leave LayerScale near 0 and biases at 0, which would hide mistakes."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2 and parameter.shape[0] > 1 and "table" not in name:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif name.endswith(("weight", "gamma")):
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(0.3 * noise)


def _train_one_step(student: nn.Module, teacher: nn.Module, images: torch.Tensor) -> None:
    """One step of Q-ViT's loss: every parameter must get a finite gradient and, offsets apart, move."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    loss = DistillationLoss(dgd=1.0)
    labels = torch.arange(len(images)) % student.qvit.architecture.num_classes
    before = copy.deepcopy(dict(student.named_parameters()))
    with tap_queries_keys(teacher) as teacher_taps, tap_queries_keys(student) as student_taps:
        with torch.no_grad():
            answer = teacher(images)
        logits = student(images)
        value, _ = loss(logits, labels, answer, student_taps.collect(), teacher_taps.collect())
        value.backward()
    if not math.isfinite(value.item()):
        raise RoadError(f"the loss of the training step is {value.item()}")
    optimizer.step()
    student.eval()
    for name, parameter in student.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise RoadError(f"{name} got no finite gradient")
        # The gradient of an offset is that of the clipped values, and there may be none.
        if torch.equal(parameter, before[name]) and not name.endswith("_quantizer.offset"):
            raise RoadError(f"{name} did not move in the training step")


@torch.no_grad()
def _rebuild(student: Any, images: torch.Tensor) -> None:
    """What a checkpoint holds, the description as JSON and the state dict, gives the same student again."""
    again = rebuild(StudentInfo.from_dict(json.loads(json.dumps(student.qvit.to_dict()))))
    again.load_state_dict(student.state_dict())
    if not torch.equal(again.eval()(images), student(images)):
        raise RoadError("the student that was rebuilt from its description computes something else")


@torch.no_grad()
def _compare(student: nn.Module, images: torch.Tensor) -> str:
    frozen = qvit.freeze(student)
    with record_codes(student) as trained:
        wanted = student(images)
    codes: dict[str, torch.Tensor] = {}
    logits = ReferenceEngine(frozen).forward(images, codes)
    _check_same("training graph", trained, wanted, codes, logits)
    try:
        engine = CpuEngine(frozen, threads=1)
    except UnsupportedModelError as error:
        return str(error)
    compiled: dict[str, np.ndarray] = {}
    answer = engine.forward(images.numpy(), compiled)
    _check_same(
        "CPU engine",
        {name: torch.from_numpy(array) for name, array in compiled.items()},
        torch.from_numpy(np.asarray(answer)),
        codes,
        logits,
    )
    return "equal"


def _check_same(
    who: str,
    codes: dict[str, torch.Tensor],
    logits: torch.Tensor,
    expected: dict[str, torch.Tensor],
    expected_logits: torch.Tensor,
) -> None:
    if codes.keys() != expected.keys():
        raise RoadError(f"{who} and reference engine differ in their points: {sorted(codes.keys() ^ expected.keys())}")
    for name, code in expected.items():
        if not torch.equal(codes[name], code):
            raise RoadError(f"{who} and reference engine differ in the codes of {name}")
        if code.unique().numel() < 2:
            raise RoadError(f"all codes of {name} are the same, so that comparing them says nothing")
    if not torch.equal(logits, expected_logits):
        raise RoadError(f"{who} and reference engine differ in the logits")
