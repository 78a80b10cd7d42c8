"""A fused training step of a whole student is the plain one: loss, taps and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from qvit.distill import DistillationLoss, tap_queries_keys
from qvit.kernels import switch
from qvit.layers.attention import QuantAttention
from qvit.layers.linear import QuantLinear
from qvit.spec import ModelSpec

Factory = Callable[..., Any]


def _step(student: nn.Module, teacher: nn.Module, images: torch.Tensor, fused: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """The full Q-ViT loss and the gradient of every parameter."""
    student.zero_grad()
    with switch.fused(fused), tap_queries_keys(student) as own, tap_queries_keys(teacher) as others:
        with torch.no_grad():
            answer = teacher(images)
        logits = student(images)
        loss, _ = DistillationLoss(label=0, hard=0, soft=1, dgd=0.3)(logits, None, answer, own.collect(), others.collect())
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


CASES: dict[str, dict[str, Any]] = {
    "q-vit": {},
    "no IRM": {"rectify": False},
    "3 bits, v a head": {"weight_bits": 3, "act_bits": 3, "overrides": {"*.v": {"scale": "per_head", "offset": "per_head"}}},
    "q with an offset": {"overrides": {"*.q": {"offset": "per_channel"}, "*.k": {"offset": "none"}}},
    "signed inputs": {"overrides": {"*.fc1.input": {"signed": True, "offset": "none"}}},
    "what stays plain": {
        "overrides": {"*.fc2.input": {"scale": "per_token"}, "blocks.0.attn.map": {"scale": "per_token"}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_fused_step_is_the_plain_one(case: str, make_student: Factory, small_vit: Factory, device: torch.device) -> None:
    # Two blocks where they differ, and once where they do not: Triton's interpreter is slow.
    teacher = small_vit(drop_path_rate=0.0, depth=2 if case in ("q-vit", "what stays plain") else 1)
    student = make_student(teacher, spec=ModelSpec(**({"weight_bits": 2, "act_bits": 2} | CASES[case])))
    _same_step(student, teacher, (3, 3, 48, 48), device)


@pytest.mark.parametrize("case", CASES)
def test_what_runs_fused(
    case: str, make_student: Factory, small_vit: Factory, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All linear layers and attentions, but for those with a scale a token: else the steps above would be equal for nothing."""
    student = make_student(small_vit(), spec=ModelSpec(**({"weight_bits": 2, "act_bits": 2} | CASES[case]))).to(device)
    ran: set[nn.Module] = set()

    def linear(self: QuantLinear, x: torch.Tensor, _activation: str) -> torch.Tensor:
        ran.add(self)
        return x.new_zeros(*x.shape[:-1], self.out_features)

    def attention(self: QuantAttention, x: torch.Tensor) -> torch.Tensor:
        ran.add(self)
        return self.qkv(x)[..., : x.shape[-1]]

    monkeypatch.setattr(QuantLinear, "fused", linear)
    monkeypatch.setattr(QuantAttention, "_fused", attention)
    with switch.fused(), torch.no_grad():
        student(torch.randn(1, 3, 48, 48).to(device))
    modules = {name: m for name, m in student.named_modules() if isinstance(m, (QuantLinear, QuantAttention))}
    plain = {name for name, module in modules.items() if module not in ran}
    depth = len(student.blocks)
    assert len(modules) == 5 * depth + 1
    assert plain == ({"blocks.0.attn", *(f"blocks.{n}.mlp.fc2" for n in range(depth))} if case == "what stays plain" else set())


def test_so_it_is_for_swin(make_student: Factory, small_swin: Factory, device: torch.device) -> None:
    teacher = small_swin(drop_path_rate=0.0)
    student = make_student(teacher, spec=ModelSpec(weight_bits=4, act_bits=4))
    _same_step(student, teacher, (1, 3, 32, 32), device)


def _off_the_edge(student: nn.Module) -> None:
    """Moves offsets: calibration puts the least value of a channel on the edge of the range, where rounding decides."""
    for module in student.modules():
        offset = getattr(module, "offset", None)
        if isinstance(offset, nn.Parameter):
            offset.data += 0.1 * module.scale.detach().mean()


def _same_step(student: nn.Module, teacher: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
    """Losses agree, and so do the gradients of every parameter, in direction and length.

    A code that falls on the other side of its threshold moves a few gradients, all of them where few values are outside of a
    quantizer's range: on a GPU, whose products round in another order, the median over five batches is compared.
    """
    _off_the_edge(student)
    student, teacher = student.to(device), teacher.to(device)
    cosines: dict[str, list[float]] = {}
    lengths: dict[str, list[float]] = {}
    for _ in range(5 if device.type == "cuda" else 1):
        images = torch.randn(shape).to(device)  # drawn on the CPU: the same on any device
        plain, plain_grads = _step(student, teacher, images, fused=False)
        fused, fused_grads = _step(student, teacher, images, fused=True)
        assert fused == pytest.approx(plain, rel=2e-2)
        assert plain_grads.keys() == fused_grads.keys()
        for name, want in plain_grads.items():
            if want.norm() > 1e-5:
                got = fused_grads[name]
                cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
                cosines.setdefault(name, []).append(cosine.item())
                lengths.setdefault(name, []).append((got.norm() / want.norm()).item())
    assert cosines
    assert not {name: values for name, values in cosines.items() if median(values) <= 0.98}
    assert not {name: values for name, values in lengths.items() if abs(median(values) - 1) > 0.1}


def test_only_within_the_context_and_never_after_an_error() -> None:
    x = torch.zeros(1)
    assert not switch.active(x)
    with switch.fused():
        assert switch.active(x) == switch.runnable(x.device)
    with pytest.raises(RuntimeError), switch.fused():
        raise RuntimeError
    assert not switch.active(x)
    with switch.fused(), switch.fused(False):
        assert not switch.active(x)


def test_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not switch.runnable(torch.device("cpu"))
    assert switch.training_dtype(torch.device("cpu")) is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert switch.training_dtype(torch.device("cpu")) is torch.bfloat16
