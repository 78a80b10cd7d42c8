"""LSQ and LSQ+: a uniform quantizer whose step, and optionally offset, are learned.

The kernels that it simulates: ``quantize`` and the codes epilogues of `qvit.integer.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from qvit.errors import NotCalibratedError
from qvit.spec import Dims, HalfStep, PerGroup, QuantSpec


class Quantized(NamedTuple):
    """A quantized tensor as the training graph carries it.

    ``value`` carries the gradient; ``codes`` are what the matrix products run on (`qvit.layers.code_matmul`).

    Attributes:
        value: ``scale * codes + offset``, the shape of the input; in the autocast type if autocast is on.
        codes: whole numbers of the same shape and type, no gradient. Exact in bfloat16, since they have 8 bits at most.
        scale: detached, broadcastable against ``value`` (a `PerGroup` scale is not yet repeated).
        offset: detached, broadcastable; ``None`` where the spec has none.
        spec: how it was quantized.
    """

    value: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    spec: QuantSpec


def repeat_groups(scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """A `PerGroup` scale [.., K / size] repeated to [.., K]; any other scale as it is."""
    return scale.repeat_interleave(spec.scale.size, dim=-1) if isinstance(spec.scale, PerGroup) else scale


def _forward(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, qn: int, qp: int, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    v = (x.to(scale.dtype) if offset is None else x - offset) / scale
    codes = v.round().clamp(qn, qp)
    value = codes * scale if offset is None else codes * scale + offset
    return value.to(out_dtype), codes.to(out_dtype)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, qn: int, qp: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    grad = grad.to(scale.dtype)
    v = (x.to(scale.dtype) if offset is None else x - offset) / scale
    inside = (v >= qn) & (v <= qp)
    slope = torch.where(inside, v.round() - v, v.clamp(qn, qp))
    grad_scale = (grad * slope).sum_to_size(scale.shape)
    grad_offset = None if offset is None else torch.where(inside, 0, grad).sum_to_size(offset.shape)
    return torch.where(inside, grad, 0).to(x.dtype), grad_scale, grad_offset


class _LSQ(torch.autograd.Function):
    """The quantizer with the gradients of LSQ+ (Bhalgat et al. 2020, equations 3 to 5), unscaled.

    d value / d x      = 1 inside the range, 0 outside
    d value / d scale  = code - (x - offset) / scale inside, qn or qp outside
    d value / d offset = 0 inside, 1 outside
    """

    @staticmethod
    def forward(ctx, x, scale, offset, qn, qp, out_dtype):  # type: ignore[override]
        value, codes = _forward(x, scale, offset, qn, qp, out_dtype)
        ctx.save_for_backward(x, scale, offset)
        ctx.range = (qn, qp)
        ctx.mark_non_differentiable(codes)
        return value, codes

    @staticmethod
    def backward(ctx, grad_value, _grad_codes):  # type: ignore[override]
        return *_backward(grad_value, *ctx.saved_tensors, *ctx.range), None, None, None


SMALLEST_SCALE = 1e-8


class _LearnedScale(torch.autograd.Function):
    """A scale, at least `SMALLEST_SCALE`, whose gradient is multiplied by a factor.

    The gradient passes where the scale was raised, too, so that one which an optimizer made negative comes back. A positive
    scale stays the same bit for bit.
    """

    @staticmethod
    def forward(ctx, scale, factor):  # type: ignore[override]
        ctx.factor = factor
        return scale.clamp_min(SMALLEST_SCALE)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad * ctx.factor, None


def learned_parameters(
    scale: torch.Tensor, offset: torch.Tensor | None, spec: QuantSpec, grad_factor: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and offset as a quantizer uses them: the scale positive and with LSQ's gradient factor, a half step derived.

    The arguments are those of `lsq_quantize`.
    """
    own_scale = _LearnedScale.apply(scale, grad_factor)
    return own_scale, own_scale * 0.5 if isinstance(spec.offset, HalfStep) else offset


def lsq_quantize(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, spec: QuantSpec, grad_factor: float = 1.0
) -> Quantized:
    """Quantizes ``x`` with straight-through gradients.

    Args:
        x: any shape, floating point.
        scale: of shape ``spec.scale_shape(dims)``; what is not positive counts as the smallest scale.
        offset: of shape ``spec.offset_shape(dims)``; ``None`` where the spec learns none (a `HalfStep` is derived here).
        spec: code range and granularity.
        grad_factor: multiplies the gradient of ``scale`` (LSQ's ``g = 1 / sqrt(values per scale * qp)``).

    Source: Esser et al. 2020, equations 1 to 3; Bhalgat et al. 2020; Q-ViT, section 3.1.
    """
    own_scale, offset = learned_parameters(scale, offset, spec, grad_factor)
    device = x.device.type
    out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else scale.dtype
    with torch.autocast(device, enabled=False):
        value, codes = _LSQ.apply(x, repeat_groups(own_scale, spec), offset, spec.qn, spec.qp, out_dtype)
    return Quantized(value, codes, own_scale.detach(), None if offset is None else offset.detach(), spec)


class LSQQuantizer(nn.Module):
    """A learned-step quantizer of one tensor.

    Args:
        spec: how to quantize.
        dims: the extents of the tensor, without batch.

    Attributes:
        scale: parameter of shape ``spec.scale_shape(dims)``.
        offset: parameter of shape ``spec.offset_shape(dims)``, or ``None``.
        calibrated: buffer, false until `set_parameters`; an uncalibrated quantizer refuses to run.
        enabled: if false the layer runs in floating point (`qvit.layers.points.float_mode`).
        observer: while set, called in floating point with every tensor that the quantizer would have quantized.

    Raises:
        NotCalibratedError: run before calibration.
    """

    calibrated: torch.Tensor

    def __init__(self, spec: QuantSpec, dims: Dims) -> None:
        super().__init__()
        self.spec = spec
        self.dims = dims
        self.enabled = True
        self.observer: Callable[[torch.Tensor], None] | None = None
        self.scale = nn.Parameter(torch.ones(spec.scale_shape(dims)))
        offset_shape = spec.offset_shape(dims)
        self.offset = None if offset_shape is None else nn.Parameter(torch.zeros(offset_shape))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        # Reading the buffer would synchronise a GPU in every forward.
        self._calibrated = False
        values = dims.channels * (dims.rows or 1) * (dims.heads or 1)
        self.grad_factor = 1 / math.sqrt(max(values / self.scale.numel(), 1) * max(spec.qp, 1))

    def set_parameters(self, scale: torch.Tensor, offset: torch.Tensor | None = None) -> None:
        """Sets scale and offset from calibration and marks the quantizer as calibrated."""
        with torch.no_grad():
            self.scale.copy_(scale.reshape(self.scale.shape))
            if self.offset is not None and offset is not None:
                self.offset.copy_(offset.reshape(self.offset.shape))
        self.mark_calibrated()

    def mark_calibrated(self) -> None:
        """Lets the quantizer run with the parameters it has."""
        self.calibrated.fill_(True)
        self._calibrated = True

    def observe(self, x: torch.Tensor) -> torch.Tensor:
        """Shows ``x`` to the observer, if there is one, and returns it."""
        if self.observer is not None:
            self.observer(x)
        return x

    def effective_scale(self) -> torch.Tensor:
        """The scale that the forward uses: never zero or negative, whatever an optimizer did. Shape of `scale`."""
        return self.scale.clamp_min(SMALLEST_SCALE)

    def learned_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and offset as the forward uses them, with gradients; what a fused kernel is given.

        Raises:
            NotCalibratedError: run before calibration.
        """
        self.check_calibrated()
        return learned_parameters(self.scale, self.offset, self.spec, self.grad_factor)

    def check_calibrated(self) -> None:
        """Raises `NotCalibratedError` if the quantizer has no parameters yet; what a fused kernel stands in for asks this."""
        if not self._calibrated:
            raise NotCalibratedError(
                "The quantized model is not calibrated: run qvit.calibrate(model, loader) before using it."
            )

    def forward(self, x: torch.Tensor) -> Quantized:
        """x [.., rows, channels] -> the same shape, quantized."""
        self.check_calibrated()
        return lsq_quantize(x, self.scale, self.offset, self.spec, self.grad_factor)

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._calibrated = bool(self.calibrated)

    def extra_repr(self) -> str:
        sign = "signed" if self.spec.signed else "unsigned"
        return f"{self.spec.operand.value}: {self.spec.bits} bit {sign}, scale={self.spec.scale}, offset={self.spec.offset}"
