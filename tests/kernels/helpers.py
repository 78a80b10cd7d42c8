"""Comparing a fused kernel with its plain counterpart in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def close(got: torch.Tensor, want: torch.Tensor, digits: float, flips: float = 0.0) -> None:
    """Every element within ``digits`` of the largest magnitude, but for a share ``flips`` of them."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    far = (got.double().cpu() - want.double().cpu()).abs() > digits * want.abs().max().clamp_min(1e-6).cpu()
    assert far.double().mean() <= flips, f"{int(far.sum())} of {far.numel()} differ"


def compare(
    fused: Callable[..., torch.Tensor],
    plain: Callable[..., torch.Tensor],
    arguments: Sequence[torch.Tensor],
    device: torch.device,
    digits: float = 2e-5,
    flips: float = 0.0,
) -> None:
    """Results and gradients of ``fused`` in float32 on the device, of ``plain`` in float64 on the CPU."""
    leaves = [a.to(device, torch.float32).requires_grad_() for a in arguments]
    doubles = [a.detach().double().cpu().requires_grad_() for a in leaves]
    got, want = fused(*leaves), plain(*doubles)
    close(got, want.detach(), digits, flips)
    upstream = torch.randn(want.shape, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, leaves, upstream.to(device, got.dtype), allow_unused=True)
    want_grads = torch.autograd.grad(want, doubles, upstream, allow_unused=True)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            close(g, w, digits, flips)
