"""Taps: q and k of every attention block, of a float timm model or of a quantized student, without touching their code."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qvit.errors import TrainingError
from qvit.layers.attention import QuantAttention


class QueryKeyTaps:
    """Keeps q and k of the last forward pass until they are collected; a context manager, or persistent until `close`.

    - A float model: what timm's attention computes from ``attn.qkv`` (after ``q_norm`` and ``k_norm`` where it has them),
      whether its attention is fused or not.
    - A quantized student: q~ and k~ as they enter their quantizers, after IRM.
    - A Swin Transformer, float or quantized: B counts windows, N their tokens, so that DGD compares window by window.

    Gradients flow through what was tapped unless the forward pass ran without them.

    The hooks belong to the inner modules and fire whoever calls them: attach before a loop of your own wraps the model.

    Args:
        model: with timm's attention (``qkv`` and ``num_heads``) or `QuantAttention` inside.

    Raises:
        TrainingError: the model has no such attention.
    """

    def __init__(self, model: nn.Module) -> None:
        self._taken: dict[tuple[int, str], torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._students: list[QuantAttention] = []
        self.blocks = 0
        for module in model.modules():
            if isinstance(module, QuantAttention):
                self._tap_student(module, self.blocks)
            elif isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
                self._tap_float(module, self.blocks)
            else:
                continue
            self.blocks += 1
        if not self.blocks:
            raise TrainingError(
                f"{type(model).__name__} has no attention whose queries and keys DGD could read: use a timm ViT."
            )

    def _tap_student(self, attention: QuantAttention, block: int) -> None:
        def keep(q: torch.Tensor, k: torch.Tensor) -> None:
            self._taken[block, "q"], self._taken[block, "k"] = q, k

        attention.tap = keep
        self._students.append(attention)

    def _tap_float(self, attention: Any, block: int) -> None:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            heads = attention.num_heads
            q, k, _ = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            self._taken[block, "q"] = attention.q_norm(q) if hasattr(attention, "q_norm") else q
            self._taken[block, "k"] = attention.k_norm(k) if hasattr(attention, "k_norm") else k

        self._handles.append(attention.qkv.register_forward_hook(hook))

    def collect(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(q, k) of every block, each [B, H, N, D], of the last forward pass; forgets them.

        Raises:
            TrainingError: the model has not run since the last `collect`.
        """
        if len(self._taken) != 2 * self.blocks:
            raise TrainingError("There are no queries and keys to collect: run the tapped model before each collect().")
        taps = [(self._taken[block, "q"], self._taken[block, "k"]) for block in range(self.blocks)]
        self.clear()
        return taps

    def clear(self) -> None:
        """Forgets what was tapped, say after an evaluation."""
        self._taken.clear()

    def close(self) -> None:
        """Removes the hooks and taps."""
        for attention in self._students:
            attention.tap = None
        self._students.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def tap_queries_keys(model: nn.Module) -> QueryKeyTaps:
    """Taps every block of ``model``; see `QueryKeyTaps`."""
    return QueryKeyTaps(model)
