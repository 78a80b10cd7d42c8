"""IRM's initialisation keeps q and k, far better than its default does."""

import pytest
import torch

from qvit.calibration import rectify_init
from qvit.calibration.rectify_init import anchors_of, even_rotation, initialise_rectify, least_squares, rotate
from qvit.layers.points import float_mode


def _attention(make_student, small_vit, **options):
    student = make_student(small_vit(**options))
    return student, student.blocks[0].attn


def _scores(attention, q, k):
    """Scores without their mean over the keys, which softmax cancels: [B, H, N, N]."""
    scores = q @ k.transpose(-2, -1) * attention.scale
    return scores - scores.mean(-1, keepdim=True)


def _split(attention, x):
    return attention.qkv(x).reshape(len(x), -1, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)


def _relative(after, before):
    return ((after - before).norm() / before.norm()).item()


def test_least_squares_is_the_best_affine_map():
    z = torch.randn(3, 2, 40, 5, dtype=torch.float64)
    target = 2.5 * z - 0.75 + 0.1 * torch.randn_like(z)
    weight, bias = least_squares(z, target)
    for h in range(2):
        for d in range(5):
            a = torch.stack([z[:, h, :, d].flatten(), torch.ones(120, dtype=torch.float64)], 1)
            expected = torch.linalg.lstsq(a, target[:, h, :, d].flatten()[:, None]).solution.flatten()
            torch.testing.assert_close(torch.stack([weight[h, d], bias[h, d]]), expected)


def test_the_anchor_lies_where_q_is_quiet_and_standardising_keeps_it():
    q = torch.randn(4, 3, 50, 8, dtype=torch.float64)
    q[..., 2] *= 0.01
    q[..., 5] *= 0.01
    anchor = anchors_of(q)
    torch.testing.assert_close(anchor.sum(-1), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    # Two quiet channels span one direction that is orthogonal to the all-ones vector: (1, -1) on them.
    assert (anchor[:, [2, 5]].square().sum(-1) / anchor.square().sum(-1) > 0.99).all()
    centred = q - q.mean(-1, keepdim=True)
    expected = rectify_init.ANCHOR * centred.square().sum(-1).mean((0, 2))
    torch.testing.assert_close(anchor.square().sum(-1), expected)


@pytest.mark.parametrize("width", [2, 16, 24, 33, 64])
def test_the_rotation_evens_out_the_channels(width):
    spread = torch.logspace(0, 2, width, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    q, k = (torch.randn(4, 3, 200, width, dtype=torch.float64) * spread @ mix for _ in range(2))
    rotation = even_rotation(q, k)
    identity = torch.eye(width, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity)
    energy = (q @ rotation.transpose(1, 2)[None]).square().mean((0, 2)) + (k @ rotation.transpose(1, 2)[None]).square().mean(
        (0, 2)
    )
    assert energy.max() / energy.min() < 1.5
    # What IRM removes, the mean over the head width, is the direction of least energy.
    lost = (q @ rotation.transpose(1, 2)[None]).mean(-1).square().mean() * width
    assert lost < 2 * q.square().sum(-1).mean() * (spread[0] / spread.norm()) ** 2


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_rotating_keeps_the_scores(make_student, small_vit, qkv_bias):
    student, attention = _attention(make_student, small_vit, qkv_bias=qkv_bias)
    x = torch.randn(2, student.qvit.architecture.num_tokens, 48)
    with torch.no_grad(), float_mode(student):
        q, k, v = _split(attention, x)
        rotate(attention, even_rotation(q, k))
        turned_q, turned_k, same_v = _split(attention, x)
    assert not torch.allclose(turned_q, q)
    assert torch.equal(same_v, v)
    torch.testing.assert_close(turned_q @ turned_k.transpose(-2, -1), q @ k.transpose(-2, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_attention_is_kept(make_student, small_vit, qkv_bias):
    student, attention = _attention(make_student, small_vit, qkv_bias=qkv_bias)
    x = torch.randn(6, student.qvit.architecture.num_tokens, 48)
    with torch.no_grad(), float_mode(student):
        q, k, v = _split(attention, x)
        default = _relative(_scores(attention, *attention.rectified(x)[:2]), _scores(attention, q, k))
        initialise_rectify(attention, x)
        new_q, new_k, new_v = attention.rectified(x)
        fitted = _relative(_scores(attention, new_q, new_k), _scores(attention, q, k))
    assert torch.equal(new_v, v)
    torch.testing.assert_close(new_k.mean((0, 2)), torch.zeros(3, 16), atol=1e-4, rtol=0)
    # Without a bias there is no place for the anchor, and rotation and affine part have to do.
    assert fitted < (0.15 if qkv_bias else 0.8 * default)


def test_a_longer_anchor_keeps_more(make_student, small_vit, monkeypatch):
    errors = []
    for anchor in (0.0, 4.0, 64.0):
        monkeypatch.setattr(rectify_init, "ANCHOR", anchor)
        torch.manual_seed(1)
        student, attention = _attention(make_student, small_vit)
        x = torch.randn(6, student.qvit.architecture.num_tokens, 48)
        with torch.no_grad(), float_mode(student):
            before = _scores(attention, *_split(attention, x)[:2])
            initialise_rectify(attention, x)
            errors.append(_relative(_scores(attention, *attention.rectified(x)[:2]), before))
    assert errors[0] > 1.3 * errors[1]
    assert errors[1] > 1.1 * errors[2]
