"""DGD, distribution-guided distillation: how far apart two models' token similarities are, in q and in k.

Source: Li et al., "Q-ViT", NeurIPS 2022, section 3.3, equations 2.22 and 2.23 of the book chapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvit.errors import TrainingError
from qvit.kernels import switch

# Below this squared distance, float32 has cancelled all digits of 2 - 2 * cosine, and the distance is replaced by its chord.
_CLOSE = 1e-6
_TINY = 1e-30

Taps = Sequence[tuple[torch.Tensor, torch.Tensor]]


def similarity_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``|| G(teacher) - G(student) ||`` with ``G(x) = x x^T / || x x^T ||`` (Frobenius norms), an image and head at a time.

    The N x N matrices G are never formed. Writing S = x_s [N, D_s] and T = x_t [N, D_t], and using the trace's cyclic symmetry,

        || x x^T ||^2     = tr(x x^T x x^T)  = || x^T x ||^2                      (D x D)
        <T T^T, S S^T>    = tr(T T^T S S^T)  = || T^T S ||^2                      (D_t x D_s)
        || G_t - G_s ||^2 = 1 + 1 - 2 <G_t, G_s>
                          = 2 - 2 || T^T S ||^2 / (|| T^T T || * || S^T S ||)

    so time and memory grow with N D^2 and D^2 instead of N^2 D and N^2.

    Rounding leaves an error of about 1e-7 in that difference. Where it falls below ``e = 1e-6`` (distance 1e-3),
    ``d = sqrt(d2)`` becomes its chord ``d2 / sqrt(e)``, and what falls below zero is zero: so the gradient is finite
    everywhere, and zero between equal similarities, where the true distance has none. G does not depend on the scale of x, so
    x is first divided by its root mean square (a constant to the gradient, exactly for that reason), and no power of it over-
    or underflows.

    Args:
        student, teacher: [B, H, N, D]; the two head widths may differ, the rest is equal.

    Returns:
        [B, H], between 0 and sqrt(2), computed in float32 (float64 for float64 inputs) even under autocast.
    """
    if switch.active(student) and _is_dense(student):
        from qvit.kernels.similarity import fused_similarity_distance  # needs Triton

        return fused_similarity_distance(student, teacher, _CLOSE, _TINY)
    with torch.autocast(student.device.type, enabled=False):
        s, t = _unit_scale(student), _unit_scale(teacher)
        own_s = _squared_norm(s.transpose(-2, -1) @ s)
        own_t = _squared_norm(t.transpose(-2, -1) @ t)
        cross = _squared_norm(t.transpose(-2, -1) @ s)
        squared = (2 - 2 * cross * (own_s * own_t).clamp_min(_TINY).rsqrt()).clamp_min(0)
        return squared * squared.clamp_min(_CLOSE).rsqrt()


def _is_dense(x: torch.Tensor) -> bool:
    """Whether x is a permutation of a contiguous tensor."""
    return torch.empty_like(x, device="meta").stride() == x.stride()


def _unit_scale(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, N, D] -> with root mean square 1 over N and D (zeros stay zeros), at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.detach().square().mean((-2, -1), keepdim=True).sqrt().clamp_min(_TINY)


def _squared_norm(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum((-2, -1))


def dgd_loss(student_taps: Taps, teacher_taps: Taps) -> torch.Tensor:
    """The distances of q and of k, summed over blocks and heads and averaged over the batch (equation 2.23).

    Where attention stays within windows (Swin), the batch counts windows: tokens of one window alone are compared with each
    other, and the average is over windows and images.

    Args:
        student_taps, teacher_taps: one (q, k) a block, each [B, H, N, D] (`qvit.distill.tap_queries_keys`).

    Returns:
        A scalar, float32.

    Raises:
        TrainingError: the two models differ in blocks, heads or tokens.
    """
    if len(student_taps) != len(teacher_taps):
        raise TrainingError(
            f"DGD compares the student's {len(student_taps)} blocks with the teacher's {len(teacher_taps)}: "
            "use a teacher with as many blocks, or set the weight of dgd to 0."
        )
    if not student_taps:
        raise TrainingError(
            "DGD got no queries and keys to compare: tap the models before they run, or set the weight of dgd to 0."
        )
    total: torch.Tensor | float = 0.0
    for block, (student, teacher) in enumerate(zip(student_taps, teacher_taps, strict=True)):
        for s, t in zip(student, teacher, strict=True):
            for what, dim in (("images", 0), ("heads", 1), ("tokens", 2)):
                if s.shape[dim] != t.shape[dim]:
                    raise TrainingError(
                        f"DGD compares {s.shape[dim]} {what} of the student with {t.shape[dim]} of the teacher "
                        f"in block {block}: "
                        "use a teacher of the student's shape, or set the weight of dgd to 0."
                    )
            total = total + similarity_distance(s, t).sum(1).mean()
    assert isinstance(total, torch.Tensor)
    return total
