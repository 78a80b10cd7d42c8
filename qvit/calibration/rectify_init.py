"""Function-preserving initialisation of IRM.

IRM divides every token's q (and k) by its own standard deviation over the head width. The affine part can undo that on
average over tokens (least squares per head and channel), but not for each token, and what is left adds up over the blocks:
on a ViT-S it costs 2 to 5 points. Three steps make it small without giving the module up:

1. Rotation: q and k are rotated together, through qkv's rows; scores do not change. The rotation takes the direction that both
   have least of to the all-ones vector, since IRM removes a token's mean over the head width; and it mixes all others so that
   every channel has the same energy, is nearly Gaussian as a sum of many, and fills the codes of the head's one scale evenly.
2. Anchor: a constant vector, added to q through the bias of qkv, in the direction in which q varies least. The standard
   deviation of a token is then dominated by a part that all tokens share, so that it varies less from token to token; the
   shift of IRM takes the constant out again. Its squared length is `ANCHOR` times the mean squared length of q: at 0 the
   division is at full strength and the pretrained function is lost, at infinity the function is exact and the division does
   nothing. Training may change it, since it lives in a bias.
3. Least squares: weight and bias of IRM, per head and channel, such that q~ is closest to q, and k~ to k without its mean over
   tokens. That mean adds one number to all scores of a query, which softmax cancels; without it k's codes are centred.

Blocks are fitted one after the other, each on the inputs that the rectified blocks before it produce.
"""

from __future__ import annotations

import math

import torch

from qvit.layers.attention import QuantAttention
from qvit.layers.rectify import Rectify

ANCHOR = 16.0


@torch.no_grad()
def initialise_rectify(attention: QuantAttention, x: torch.Tensor) -> None:
    """Sets both IRM modules of a block, and rotation and anchors in qkv, so that the float function is kept.

    Args:
        attention: with `Rectify` modules on q and k, in float mode.
        x: inputs of the attention [S, N, C] (behind the LayerNorm).
    """
    heads, width = attention.num_heads, attention.head_dim
    s, n, _ = x.shape
    unrotated = attention.qkv(x).reshape(s, n, 3, heads, width).permute(2, 0, 3, 1, 4)
    rotate(attention, even_rotation(unrotated[0], unrotated[1]))
    before = attention.qkv(x).reshape(s, n, 3, heads, width).permute(2, 0, 3, 1, 4).double()
    for index, rectify in enumerate((attention.rectify_q, attention.rectify_k)):
        assert isinstance(rectify, Rectify)
        target = before[index]
        anchored = target
        if attention.qkv.bias is not None:
            anchor = anchors_of(target)
            attention.qkv.bias.view(3, heads, width)[index] += anchor.to(attention.qkv.bias.dtype)
            anchored = target + anchor[:, None]
        if rectify is attention.rectify_k:  # what all keys share, softmax cancels
            target = target - target.mean((0, 2), keepdim=True)
        z = rectify.standardise(anchored).double()
        weight, bias = least_squares(z, target)
        rectify.weight.copy_(weight)
        rectify.bias.copy_(bias)


def even_rotation(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q, k [S, H, N, D] -> an orthogonal matrix a head [H, D, D] that evens out the energy of the channels.

    ``R = E V^T`` with the eigenvectors V of q's and k's second moments (each relative to its trace, added), the least first,
    and an orthogonal E with entries of one size, the first column constant (`_even_basis`). The second moment of channel d,
    ``sum_i E[d, i]^2 lambda_i``, is then the mean of all eigenvalues where all ``|E[d, i]|`` are equal.
    """
    moment = torch.zeros(q.shape[1], q.shape[-1], q.shape[-1], dtype=torch.float64, device=q.device)
    for x in (q, k):
        rows = x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[-1]).double()
        second = rows.transpose(1, 2) @ rows
        moment += second / second.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(1e-12)[:, None, None]
    return _even_basis(q.shape[-1]).to(q.device) @ torch.linalg.eigh(moment).eigenvectors.transpose(1, 2)


def _even_basis(width: int) -> torch.Tensor:
    """An orthogonal float64 matrix [D, D] with a constant first column: Hadamard's for powers of two, else the cosine basis."""
    if width & (width - 1) == 0:
        basis = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(width.bit_length() - 1):
            basis = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), basis)
        return basis / math.sqrt(width)
    place, wave = torch.arange(width, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)[None]
    basis = torch.cos(math.pi * (place + 0.5) * wave / width) * math.sqrt(2 / width)
    basis[:, 0] = math.sqrt(1 / width)
    # Waves i and D - i, whose squares add up to a constant nearly everywhere, get neighbouring eigenvalues.
    waves = [wave for pair in zip(range(1, width), range(width - 1, 0, -1), strict=True) for wave in pair][: width - 1]
    return basis[:, [0, *waves]]


@torch.no_grad()
def rotate(attention: QuantAttention, rotation: torch.Tensor) -> None:
    """Multiplies q and k of every head by an orthogonal matrix [H, D, D], in the rows of qkv; their products stay."""
    heads, width, linear = attention.num_heads, attention.head_dim, attention.qkv
    for rows in (linear.weight, linear.bias):
        if rows is not None:
            parts = rows.view(3, heads, width, -1)[:2]
            parts.copy_(rotation @ parts.double())


def anchors_of(q: torch.Tensor) -> torch.Tensor:
    """q [S, H, N, D] -> a constant vector a head [H, D], orthogonal to the all-ones vector that standardising removes."""
    heads, width = q.shape[1], q.shape[-1]
    rows = q.transpose(0, 1).reshape(heads, -1, width)
    centred = rows - rows.mean(-1, keepdim=True)
    mean = centred.mean(1)
    spread = centred - mean[:, None]
    covariance = spread.transpose(1, 2) @ spread / rows.shape[1]
    ones = torch.ones(width, width, dtype=q.dtype, device=q.device)
    # Pushes the all-ones direction to the top of the spectrum, so that the quietest direction is orthogonal to it.
    covariance = covariance + ones * (covariance.diagonal(dim1=1, dim2=2).sum(-1) + 1)[:, None, None]
    direction = torch.linalg.eigh(covariance).eigenvectors[..., 0]
    sign = torch.where((direction * mean).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    length = (ANCHOR * centred.square().sum(-1).mean(1)).sqrt()
    return direction * sign * length[:, None]


def least_squares(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight * z + bias`` closest to ``target`` per head and channel: z, target [S, H, N, D] -> weight, bias [H, D]."""
    z_mean, target_mean = z.mean((0, 2), keepdim=True), target.mean((0, 2), keepdim=True)
    variance = (z - z_mean).square().mean((0, 2))
    weight = ((z - z_mean) * (target - target_mean)).mean((0, 2)) / variance.clamp_min(1e-12)
    return weight, target_mean[0, :, 0] - weight * z_mean[0, :, 0]
