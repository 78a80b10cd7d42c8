"""A recorded step computes what it computes unrecorded, from new inputs and parameters, until its key changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qvit.errors import TrainingError
from qvit.training.graphed import GraphedBackward

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: CPUs have no CUDA graphs")


def test_disabled_it_calls_and_clears_gradients() -> None:
    weight = nn.Parameter(torch.ones(2))
    calls: list[int] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        (weight * x).sum().backward()
        return x + 1

    backward = GraphedBackward(compute, [weight], enabled=False)
    for _ in range(6):
        assert backward(torch.tensor([3.0, 4.0])).tolist() == [4, 5]
        assert weight.grad is not None
        assert weight.grad.tolist() == [3, 4]
    assert len(calls) == 6


@needs_gpu
def test_replays_equal_plain_steps() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4)).cuda()
    calls: list[int] = []

    def compute(x: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        calls.append(1)
        loss = (model(x) - (0 if y is None else y)).square().mean()
        loss.backward()
        return loss.detach(), {"loss": loss.detach()}

    results: list[list[torch.Tensor]] = []
    for enabled in (False, True):
        torch.manual_seed(0)
        state = {name: torch.randn_like(p) for name, p in model.state_dict().items()}
        model.load_state_dict(state)
        backward = GraphedBackward(compute, model.parameters(), enabled)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        kept = []
        for step in range(8):
            torch.manual_seed(100 + step)  # of the dropout
            x, y = torch.randn(5, 8, device="cuda"), torch.randn(5, 4, device="cuda")
            loss, terms = backward(x, y, key=step >= 6)
            optimizer.step()
            kept += [loss.clone(), terms["loss"].clone(), *[p.detach().clone() for p in model.parameters()]]
        results.append(kept)
        if enabled:
            assert len(calls) == 8 + 3 + 1 + 2  # plain ones, then three and a recording, then two of the other key
    for plain, recorded in zip(*results, strict=True):
        torch.testing.assert_close(plain, recorded)


@needs_gpu
def test_what_cannot_be_recorded_is_one_sentence() -> None:
    weight = nn.Parameter(torch.ones(2, device="cuda"))

    def compute(x: torch.Tensor) -> torch.Tensor:
        (weight * x).sum().backward()
        return torch.tensor(x.sum().item())  # waits for the GPU

    backward = GraphedBackward(compute, [weight], enabled=True)
    for _ in range(3):
        backward(torch.ones(2, device="cuda"))
    with pytest.raises(TrainingError, match=r"cannot be recorded as a CUDA graph .*set cuda_graph=false"):
        backward(torch.ones(2, device="cuda"))
