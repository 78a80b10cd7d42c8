"""What attention computes, block by block, in a float model, a quantized student or an integer file: the same few tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from timm.layers.attention import Attention
from torch import nn
from torch.utils.hooks import RemovableHandle

from qvit.architecture import VitArchitecture
from qvit.distill.taps import tap_queries_keys
from qvit.engines.reference import ReferenceEngine
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.integer.ops import Rectify
from qvit.layers.attention import QuantAttention
from qvit.quantizers.lsq import lsq_quantize
from qvit.quantizers.mse_search import mse_optimal
from qvit.spec import QuantSpec

_SEARCHED = 1 << 19  # values that the search for a step looks at


@dataclass(frozen=True)
class Grid:
    """How q or k is quantized.

    Attributes:
        spec: code range and granularity.
        scale_shape, offset_shape: of its step and of its learned offset, broadcastable against [H, N, D].
    """

    spec: QuantSpec
    scale_shape: tuple[int, ...]
    offset_shape: tuple[int, ...] | None

    def fitted_to(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The quantizer of this grid whose step has the least squared error on x [B, H, N, D]: values -> codes."""
        sample = x[: max(1, _SEARCHED // x[0].numel())]
        scale, offset = mse_optimal(sample, self.spec, self.scale_shape, self.offset_shape)
        return lambda values: lsq_quantize(values.float(), scale, offset, self.spec).codes


@dataclass(frozen=True)
class BlockTrace:
    """One block's attention on a batch; tensors on the CPU or wherever the model ran, without gradients.

    Attributes:
        raw: "q" and "k" as the qkv layer gives them, [B, H, N, D].
        inputs: "q" and "k" as they enter their quantizers, after IRM; of a float model, as they are multiplied.
        codes: "q" and "k", whole numbers [B, H, N, D]; empty for a float model.
        grids: "q" and "k"; empty for a float model.
        rectified: IRM stands between raw and inputs.
        attention: weights that v is summed with, [B, H, N, N]: the softmax, quantized where the model quantizes it. ``None``
            where attention does not run over the whole image at once (windows).
    """

    raw: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    codes: dict[str, torch.Tensor]
    grids: dict[str, Grid]
    rectified: bool
    attention: torch.Tensor | None


class Tracer(Protocol):
    """Runs a model and shows its attention."""

    def __call__(self, images: torch.Tensor) -> list[BlockTrace]:
        """Normalised images [B, C, H, W] -> one trace a block, in the order of the blocks."""
        ...

    def close(self) -> None:
        """Takes its hooks off the model."""
        ...


class ModelTracer:
    """Traces a timm model or a quantized student through hooks; a context manager, or in force until `close`.

    Args:
        model: with timm's attention or `QuantAttention` inside, in evaluation mode.

    Raises:
        TrainingError: it has no attention whose q and k could be read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._taps = tap_queries_keys(model)
        self._handles: list[RemovableHandle] = []
        self._kept: list[dict[str, Any]] = []
        self._attentions: list[Any] = [m for m in model.modules() if _is_attention(m)]
        for attention in self._attentions:
            kept: dict[str, Any] = {}
            self._kept.append(kept)
            self._keep(attention.qkv, kept, "qkv")
            for name in ("q", "k", "map"):
                if (quantizer := getattr(attention, f"{name}_quantizer", None)) is not None:
                    self._keep(quantizer, kept, name)

    def _keep(self, module: nn.Module, kept: dict[str, Any], name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            kept[name] = output

        self._handles.append(module.register_forward_hook(hook))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> list[BlockTrace]:
        """See `Tracer`."""
        device = next(self.model.parameters()).device
        self.model(images.to(device))
        parts = zip(self._attentions, self._kept, self._taps.collect(), strict=True)
        return [self._block(attention, kept, q, k) for attention, kept, (q, k) in parts]

    def _block(self, attention: Any, kept: dict[str, Any], q: torch.Tensor, k: torch.Tensor) -> BlockTrace:
        raw_q, raw_k, _ = kept.pop("qkv").unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        quantized: dict[str, Any] = {name: kept.pop(name) for name in ("q", "k", "map") if name in kept}
        grids: dict[str, Grid] = {}
        for name in ("q", "k"):
            if name in quantized:
                quantizer = getattr(attention, f"{name}_quantizer")
                offset = None if quantizer.offset is None else tuple(quantizer.offset.shape)
                grids[name] = Grid(quantizer.spec, tuple(quantizer.scale.shape), offset)
        weights = None
        if type(attention) is QuantAttention and "map" in quantized:
            weights = quantized["map"].value
        elif type(attention) in (Attention, QuantAttention):
            weights = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)
        return BlockTrace(
            raw={"q": raw_q, "k": raw_k},
            inputs={"q": q, "k": k},
            codes={name: quantized[name].codes for name in grids},
            grids=grids,
            rectified=not isinstance(getattr(attention, "rectify_q", nn.Identity()), nn.Identity),
            attention=weights,
        )

    def close(self) -> None:
        """Takes the hooks off the model."""
        self._taps.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class IntegerTracer(ReferenceEngine):
    """Traces an integer file, run by the reference engine."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__(model)
        self._rectified: list[tuple[torch.Tensor, torch.Tensor]] = []

    def rectify(self, x: torch.Tensor, rectify: Rectify | None) -> torch.Tensor:
        """As the engine does, keeping what goes in and comes out: first q's, then k's of every block."""
        out = super().rectify(x, rectify)
        self._rectified.append((x, out))
        return out

    def __call__(self, images: torch.Tensor) -> list[BlockTrace]:
        """See `Tracer`."""
        self._rectified.clear()
        codes: dict[str, torch.Tensor] = {}
        self.forward(images, codes)
        return [self._block_trace(index, codes) for index in range(len(self.model.blocks))]

    def _block_trace(self, index: int, codes: dict[str, torch.Tensor]) -> BlockTrace:
        attention, name = self.model.blocks[index].attention, f"blocks.{index}.attn"
        (raw_q, q), (raw_k, k) = self._rectified[2 * index : 2 * index + 2]
        grids: dict[str, Grid] = {}
        for key, quantizer in (("q", attention.q), ("k", attention.k)):
            # A half step is derived from the scale; only a learned offset is searched for.
            offset = None if quantizer.offset is None or quantizer.half_step else quantizer.offset.shape
            grids[key] = Grid(quantizer.spec, quantizer.scale.shape, offset)
        weights = codes[f"{name}.map"].float() * torch.from_numpy(attention.map.scale)
        if attention.map.offset is not None:
            weights = weights + torch.from_numpy(attention.map.offset)
        return BlockTrace(
            raw={"q": raw_q, "k": raw_k},
            inputs={"q": q, "k": k},
            codes={key: codes[f"{name}.{key}"] for key in ("q", "k")},
            grids=grids,
            rectified=attention.rectify_q is not None,
            attention=weights,
        )

    def close(self) -> None:
        """Nothing to take off."""


def tracer_of(model: nn.Module | IntegerModel) -> ModelTracer | IntegerTracer:
    """The tracer of a model.

    Raises:
        TrainingError: as `ModelTracer`.
        UnsupportedModelError: a frozen model of another family than ViT.
    """
    if not isinstance(model, IntegerModel):
        return ModelTracer(model)
    if not isinstance(model.architecture, VitArchitecture):
        raise UnsupportedModelError(f"Attention of a frozen {model.name} cannot be shown: name its run or checkpoint instead.")
    return IntegerTracer(model)


def _is_attention(module: Any) -> bool:
    """What `qvit.distill.taps` taps."""
    if isinstance(module, QuantAttention):
        return True
    return isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads")
