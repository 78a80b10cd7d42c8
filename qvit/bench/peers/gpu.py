"""PyTorch on a GPU: operation by operation, compiled by Inductor, or with torchao's int8 linear layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvit.architecture import Architecture

if TYPE_CHECKING:
    import torch
    from torch import nn

_FILE = "model.pt"


@dataclass(frozen=True)
class TorchOnGpu:
    """See `qvit.bench.peers.Peer`; `load` takes a device in place of threads, and its function tensors on that device.

    Attributes:
        dtype: of weights and images, ``float32`` or ``bfloat16``.
        tf32: whether float32 products may be computed in TF32.
        compiled: by ``torch.compile(mode="max-autotune")``, which measures every product's kernels and records CUDA graphs.
        int8: whether the blocks' linear layers are int8, their inputs quantized token by token as they come.
    """

    name: str
    title: str
    dtype: str = "bfloat16"
    tf32: bool = False
    compiled: bool = False
    int8: bool = False

    device = "cuda"
    any_batch = True

    @property
    def packages(self) -> tuple[str, ...]:
        """Import names of what it needs."""
        return ("torchao", "torch", "timm") if self.int8 else ("torch", "timm")

    @property
    def model(self) -> str:
        """Name of what `prepare` writes."""
        return f"torch-{self.dtype}"

    def prepare(self, model: nn.Module, architecture: Architecture, batch: int, folder: Path) -> None:
        import torch

        torch.save(model.to(getattr(torch, self.dtype)), folder / _FILE)

    def load(self, folder: Path, batch: int, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Reads what `prepare` wrote; what is compiled is compiled in the first call."""
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        model: Any = torch.load(folder / _FILE, weights_only=False, map_location=device)
        if self.int8:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_in_block)
        if self.compiled:
            model = torch.compile(model, mode="max-autotune")

        def predict(images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return model(images)

        return predict


def _is_in_block(module: nn.Module, name: str) -> bool:
    """The linear layers that count; int8 products of the classification head would need more than 16 images."""
    from torch import nn

    return isinstance(module, nn.Linear) and name.startswith(("blocks.", "layers."))  # of a ViT, of a Swin


GPU_PEERS = (
    TorchOnGpu("eager", "PyTorch fp32", dtype="float32"),
    TorchOnGpu("tf32", "PyTorch TF32", dtype="float32", tf32=True),
    TorchOnGpu("eager-bf16", "PyTorch bf16"),
    TorchOnGpu("compile", "torch.compile bf16", compiled=True),
    TorchOnGpu("torchao", "torchao int8, torch.compile", compiled=True, int8=True),
)
