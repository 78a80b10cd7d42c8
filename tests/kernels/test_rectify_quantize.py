"""IRM and the three quantizers in one kernel, against the plain modules in float64."""

from __future__ import annotations

import pytest
import torch

from qvit.quantizers.lsq import lsq_quantize
from qvit.spec import Operand, PerChannel, QuantSpec

from .helpers import compare

SPECS = [
    QuantSpec(2, True, offset=PerChannel(), operand=Operand.QUERY),
    QuantSpec(3, True, offset=PerChannel(), operand=Operand.KEY),
    QuantSpec(4, True, offset=PerChannel(), operand=Operand.VALUE),
]


@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize(("b", "n", "heads", "dim"), [(2, 17, 3, 8), (1, 300, 2, 12), (3, 1, 1, 64)])
def test_equals_the_plain_modules(rectify: bool, b: int, n: int, heads: int, dim: int, device: torch.device) -> None:
    from qvit.kernels.rectify_quantize import Ranges, rectify_quantize

    eps = 1e-6 if rectify else None
    width = 3 * heads * dim
    ranges = Ranges(*[bound for spec in SPECS for bound in (spec.qn, spec.qp)])
    columns = torch.stack(
        [torch.rand(width) * 0.4 + 0.3, 0.2 * torch.randn(width), 1 + 0.3 * torch.randn(width), torch.randn(width)]
    )

    def outputs(values, q, k):  # type: ignore[no-untyped-def]
        """One tensor of all results, so that gradients come from all of them."""
        return torch.cat([values.reshape(b * n, width), q, k], 1)

    def fused(qkv, columns):  # type: ignore[no-untyped-def]
        codes, q, k = rectify_quantize(qkv, columns, heads, eps, ranges, keep=True)
        # The gradient of codes is that of values: give back values whose gradient is passed on unchanged.
        values = codes + ((codes * columns[0] + columns[1]) - codes).detach()
        return outputs(values, q, k)

    def plain(qkv, columns):  # type: ignore[no-untyped-def]
        scale, offset, weight, bias = columns.view(4, 3, heads, 1, dim).unbind(0)
        values, kept = [], []
        for part, x in enumerate(qkv.reshape(b, n, 3, heads, dim).permute(2, 0, 3, 1, 4)):
            if rectify and part < 2:
                z = torch.nn.functional.layer_norm(x, (dim,), eps=eps)
                x = z * weight[part] + bias[part]
            kept.append(x.transpose(1, 2).reshape(b * n, -1))
            spec = SPECS[part]
            v = _quantize(x, scale[part], offset[part], spec)
            values.append(v.transpose(1, 2).reshape(b * n, -1))
        return outputs(torch.cat(values, 1), *kept[:2])

    compare(fused, plain, [torch.randn(b, n, width), columns], device, digits=5e-5)


def _quantize(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """`lsq_quantize` with a scale per channel, as the kernel is given it."""
    return lsq_quantize(x, scale.expand((*x.shape[1:2], 1, x.shape[-1])), offset, spec).value


def test_what_is_not_kept_gets_no_gradient(device: torch.device) -> None:
    from qvit.kernels.rectify_quantize import Ranges, rectify_quantize

    qkv = torch.randn(2, 5, 24, device=device, requires_grad=True)
    columns = torch.ones(4, 24, device=device)
    ranges = Ranges(-2, 1, -2, 1, -2, 1)
    codes, _, _ = rectify_quantize(qkv, columns, 1, 1e-6, ranges, keep=False)
    codes.sum().backward()
    assert torch.isfinite(qkv.grad).all()
    assert qkv.grad.abs().sum() > 0
