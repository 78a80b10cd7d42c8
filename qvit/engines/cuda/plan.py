"""What plans of a forward pass have in common: the first launch and the last ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.attention import attention_launch
from qvit.engines.cuda.constants import LinearConstants
from qvit.engines.cuda.device import Device
from qvit.engines.cuda.layout import chunks, untiled
from qvit.engines.cuda.model_constants import ModelConstants
from qvit.engines.cuda.products import Products
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.steps import is_half
from qvit.integer.model import IntegerModel

_PIECE = 16  # bytes that a lane copies at a time


class Plan(Products, ABC):
    """All launches of a forward pass of ``batch`` images; `VitPlan` and `SwinPlan` put them together.

    Attributes:
        pixels: launches for uint8 and for float images; ``images`` is filled in.
        steps: what follows.
        logits: float32 [batch, classes], the result.
        strange: int32 [1], not 0 where an image held a value that is not finite.
    """

    def __init__(
        self,
        model: IntegerModel,
        constants: ModelConstants,
        batch: int,
        gpu: Device,
        with_map: bool = False,
        one_bit: bool = True,
        poison: bool = False,
        all_tokens: bool = False,
    ) -> None:
        a = model.architecture
        super().__init__(gpu, constants.patch.b.device, one_bit, poison, a.activation, may_be_late=not with_map)
        self.model, self.constants, self.batch = model, constants, batch
        self._all_tokens = all_tokens or with_map  # also where they reach nothing
        self._patches = self._codes(batch * a.num_patches, a.patch_features)
        self._stream = getattr(torch, model.residual)  # type of the residual stream
        self.strange = torch.zeros(1, dtype=torch.int32, device=self._device)
        self.logits = self._floats(batch, a.num_classes)
        self._build(with_map)

    @abstractmethod
    def _build(self, with_map: bool) -> None:
        """Makes `steps`; with the softmax map's codes among the taps where ``with_map``."""

    def pixels(self, images: torch.Tensor) -> Launch:
        """The launch that makes codes of images [B, C, H, W], uint8 or float32, contiguous."""
        a, p = self.model.architecture, self.constants.pixels
        values = {
            "images": images,
            "codes": p.codes,
            "std": p.std,
            "offset": p.offset,
            "out": self._patches,
            "strange": self.strange,
            "rows": self.batch * a.num_patches,
            "step": p.step,
            "high": p.high,
        }
        (height, width), (patch_height, patch_width) = a.img_size, a.patch_size
        floats = images.dtype != torch.uint8
        unit = math.gcd(_PIECE, patch_width, width, 0 if floats else images.data_ptr())
        defines = {
            "FLOATS": int(floats),
            "IDENTITY": int(p.identity),
            "CHANNELS": a.in_chans,
            "HEIGHT": height,
            "WIDTH": width,
            "PATCH_HEIGHT": patch_height,
            "PATCH_WIDTH": patch_width,
            "UNIT": unit,
        }
        # A warp a chunk of four patches.
        warps = -(-self.batch * a.num_patches // 4) * chunks(a.patch_features)
        return Launch("pixels", defines, (-(-warps // 4), 1, 1), 128, 0, values)

    def patch_tap(self) -> torch.Tensor:
        """Codes of the patches, int16 [B, patches, K]."""
        a = self.model.architecture
        codes = untiled(self._patches)[: self.batch * a.num_patches, : a.patch_features]
        return codes.reshape(self.batch, a.num_patches, -1).to(torch.int16)

    def _attention(
        self,
        block: dict[str, Any],
        q_k_v: tuple[torch.Tensor, ...],
        maps: torch.Tensor | None,
        out: torch.Tensor,
        within: Shape | None = None,
        alone: bool = False,
    ) -> None:
        """Attention of a block; where its rows are tokens ``within`` longer sequences, keys and values are of these.

        ``alone``: q has none but those rows.
        """
        proj: LinearConstants = block["proj"]
        bits, queries = self._bits(proj) is not None, self._shape.tokens
        shape = within or self._shape
        self._add(attention_launch(shape, self._gpu, block, q_k_v, maps, out, self._chunks(proj), bits, queries, alone))

    def _average(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """The final norm of every token, if there is one, and the average of an image's tokens from ``first`` on."""
        (rows, width), norm = x.shape, self.constants.norm
        if norm is not None:
            tokens = self._floats(rows, width)
            self._norm(norm, x, tokens, rows, width, width)
            x = tokens
        pooled = self._floats(self.batch, width)
        values = {"x": x, "out": pooled, "tokens": rows // self.batch, "first": first, "channels": width}
        self._add(Launch("pool", {"X_HALF": is_half(x)}, (self.batch, -(-width // 128), 1), 128, 0, values))
        return pooled

    def _logits(self, x: torch.Tensor, apart: int) -> None:
        """The heads, of rows ``apart`` floats apart; head i reads token i."""
        a, constants, width = self.model.architecture, self.constants, x.shape[1]
        for index, (name, (norm, layer)) in enumerate(zip(a.heads, constants.heads, strict=True)):
            codes = self._codes(self.batch, width)
            row, source, ldx = index, x, apart
            if constants.pooled_norm is not None:
                floats = self._floats(self.batch, width)
                self._norm(constants.pooled_norm, x, floats, self.batch, apart, width, row)
                row, source, ldx = 0, floats, width
            self._norm(norm, source, codes, self.batch, ldx, chunks(width), row)
            self._tap(f"{name}.input", codes, (self.batch, width), layer.signed)
            self._linear(layer, codes, self.logits, self.batch, residual=self.logits if index else None, halved=bool(index))
