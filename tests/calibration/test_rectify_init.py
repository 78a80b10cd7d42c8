"""IRM's initialisation keeps q and k, far better than its default does."""

import pytest
import torch

from qvit.calibration import rectify_init
from qvit.calibration.rectify_init import anchors_of, initialise_rectify, least_squares
from qvit.layers.points import float_mode


def _attention(make_student, small_vit, **options):
    student = make_student(small_vit(**options))
    return student, student.blocks[0].attn


def _unexplained(after, before):
    return ((after - before).square().sum() / (before - before.mean((0, 2), keepdim=True)).square().sum()).item()


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


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_q_and_k_are_kept(make_student, small_vit, qkv_bias):
    student, attention = _attention(make_student, small_vit, qkv_bias=qkv_bias)
    x = torch.randn(6, student.qvit.architecture.num_tokens, 48)
    with torch.no_grad(), float_mode(student):
        raw = attention.qkv(x).reshape(6, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        default = [_unexplained(after, before) for after, before in zip(attention.rectified(x)[:2], raw, strict=False)]
        initialise_rectify(attention, x)
        q, k, v = attention.rectified(x)
        fitted = [_unexplained(q, raw[0]), _unexplained(k, raw[1])]
    assert torch.equal(v, raw[2])
    for before, after in zip(default, fitted, strict=True):
        # Without a bias there is no place for the anchor, and the affine part alone has to do.
        assert after < (0.12 if qkv_bias else before)


def test_a_longer_anchor_keeps_more(make_student, small_vit, monkeypatch):
    errors = []
    for anchor in (0.0, 4.0, 64.0):
        monkeypatch.setattr(rectify_init, "ANCHOR", anchor)
        torch.manual_seed(1)
        student, attention = _attention(make_student, small_vit)
        x = torch.randn(6, student.qvit.architecture.num_tokens, 48)
        with torch.no_grad(), float_mode(student):
            before = attention.qkv(x).reshape(6, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)[0]
            initialise_rectify(attention, x)
            errors.append(_unexplained(attention.rectified(x)[0], before))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]
