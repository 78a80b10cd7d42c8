"""Gradients of two gloo processes become their mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from qvit.training.averaging import average_gradients

from .test_engine import environment

PROGRAM = """
import torch, torch.distributed as dist
from torch import nn
from qvit.training.averaging import average_gradients
dist.init_process_group("gloo")
rank = dist.get_rank()
parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (1,), (7,))]
for number, parameter in enumerate(parameters[:2]):
    parameter.grad = torch.full_like(parameter, 10.0 * number + rank)
average_gradients(parameters, dist.get_world_size())
assert torch.equal(parameters[0].grad, torch.full((3, 5), 0.5)), parameters[0].grad
assert torch.equal(parameters[1].grad, torch.full((1,), 10.5)), parameters[1].grad
assert parameters[2].grad is None
dist.destroy_process_group()
"""


def test_two_processes_get_the_mean(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    done = subprocess.run(launcher, env=environment(), timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_process_keeps_its_own() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    average_gradients([parameter], 1)
    assert parameter.grad.tolist() == [1, 2]
