"""Features of different shape made comparable: resampled maps, learned channels, standardised targets."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qvit.distill.features import feature_loss
from qvit.distill.layout import TokenLayout
from qvit.distill.projection import FeatureProjector, resampling, standardised

VIT = TokenLayout(1, True, 4, 4, 12)
SWIN = TokenLayout(0, False, 2, 2, 20)


@pytest.mark.parametrize(("grid", "to"), [((16, 16), (14, 14)), ((16, 16), (7, 7)), ((5, 7), (3, 9)), ((4, 4), (8, 8))])
def test_maps_are_resized_as_images_are(grid: tuple[int, int], to: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *grid)
    matrix = resampling(grid, to)
    got = (matrix @ maps.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, to)
    torch.testing.assert_close(got, F.interpolate(maps, to, mode="bilinear", antialias=True))
    torch.testing.assert_close(matrix.sum(1), torch.ones(to[0] * to[1]))


def test_halving_a_map_reads_every_token_and_keeps_places() -> None:
    matrix = resampling((4, 4), (2, 2))
    assert bool((matrix.sum(0) > 0).all())
    # The upper left token comes from the upper left, rows before columns.
    assert matrix[0].view(4, 4)[:2, :2].sum() > 0.7
    assert matrix[1].view(4, 4)[:2, 2:].sum() > 0.7


def test_targets_are_standardised_channel_by_channel() -> None:
    features = torch.randn(6, 50, 3) * torch.tensor([100.0, 1.0, 0.2]) + torch.tensor([1000.0, 0.0, -3.0])
    got = standardised(features.requires_grad_())
    assert not got.requires_grad
    torch.testing.assert_close(got.mean((0, 1)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(got.std((0, 1), correction=0), torch.ones(3), atol=0.15, rtol=0)
    assert standardised(torch.ones(2, 3, 4)).tolist() == torch.zeros(2, 3, 4).tolist()
    assert standardised(features.bfloat16()).dtype == torch.float32


def test_class_token_and_map_are_compared_apart() -> None:
    student = TokenLayout(2, True, 2, 2, 5)  # a distillation token, which the teacher has not
    projector = FeatureProjector([student], [VIT])
    own, other = torch.randn(3, 6, 5), torch.randn(3, 17, 12)
    (a_class, a_map), (b_class, b_map) = projector([own], [other])
    projection = projector.projections[0]
    torch.testing.assert_close(a_class, projection(own[:, :1]))
    torch.testing.assert_close(a_map, projection(own[:, 2:]))
    torch.testing.assert_close(b_class, standardised(other[:, :1]))
    torch.testing.assert_close(b_map, standardised(resampling((4, 4), (2, 2)) @ other[:, 1:]))


def test_without_a_class_token_and_on_the_same_grid() -> None:
    student = TokenLayout(0, False, 4, 4, 5)
    projector = FeatureProjector([student, SWIN], [VIT, VIT])
    assert projector.resampling_0 is None
    assert not [name for name in projector.state_dict() if "resampling" in name]
    own, other = [torch.randn(3, 16, 5), torch.randn(3, 4, 20)], [torch.randn(3, 17, 12), torch.randn(3, 17, 12)]
    mine, theirs = projector(own, other)
    assert [m.shape for m in mine] == [t.shape for t in theirs] == [(3, 16, 12), (3, 4, 12)]
    torch.testing.assert_close(theirs[0], standardised(other[0][:, 1:]))
    with pytest.raises(ValueError, match="zip"):
        projector(own[:1], other)


def test_gradients_reach_student_and_projection_but_not_the_teacher() -> None:
    projector = FeatureProjector([SWIN], [VIT])
    own, other = torch.randn(3, 4, 20, requires_grad=True), torch.randn(3, 17, 12, requires_grad=True)
    loss = feature_loss(*projector([own], [other]))
    loss.backward()
    assert other.grad is None
    want = (projector.projections[0](own) - standardised(resampling((4, 4), (2, 2)) @ other[:, 1:])).square().mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)  # standardised, all channels count alike
    assert own.grad is not None
    for parameter in projector.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_what_is_a_linear_map_of_the_teacher_can_be_matched() -> None:
    torch.manual_seed(0)
    other = torch.randn(8, 17, 12) * torch.linspace(0.1, 30, 12) + 40
    own = standardised(other) @ torch.randn(12, 12)
    projector = FeatureProjector([VIT], [VIT])
    optimizer = torch.optim.Adam(projector.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = feature_loss(*projector([own], [other]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8
    assert losses[-1] < 0.15  # class tokens have moments of their own, of eight images here
