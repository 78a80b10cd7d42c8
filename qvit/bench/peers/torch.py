"""PyTorch on the CPU, compiled by Inductor: quantized to int8 through PT2E, or in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.architecture import Architecture

if TYPE_CHECKING:
    from torch import nn

    from qvit.bench.peers import Predict

_FILE = "model.pt2"
_CALIBRATION_BATCHES = 4


class _Compiled:
    """What both have in common: an exported program that is compiled, with its weights frozen, when it is loaded."""

    device = "cpu"
    any_batch = False

    def load(self, folder: Path, batch: int, threads: int) -> Predict:
        import torch
        import torch._inductor.config as inductor

        self._import()
        inductor.freezing = True
        torch.set_num_threads(threads)
        model: Any = torch.compile(torch.export.load(folder / _FILE).module())

        def predict(images: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return model(self._in(torch.from_numpy(images))).float().numpy()

        return predict

    def _import(self) -> None:
        """Imports what registers the operators of the exported program."""

    def _in(self, images: Any) -> Any:
        return images


class TorchInt8(_Compiled):
    """See `qvit.bench.peers.Peer`."""

    name = "torch"
    title = "PyTorch int8 (PT2E)"
    packages: tuple[str, ...] = ("torchao", "torch", "timm")
    model = "torch"

    def prepare(self, model: nn.Module, architecture: Architecture, batch: int, folder: Path) -> None:
        """The quantizer that Inductor's x86 backend fuses: activations per tensor, weights per channel."""
        import torch
        from torchao.quantization import pt2e
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        images = torch.randn(batch, architecture.in_chans, *architecture.img_size)
        with torch.no_grad():
            quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
            observed = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
            for _ in range(_CALIBRATION_BATCHES):
                observed(torch.randn_like(images))
            quantized = convert_pt2e(observed)
            pt2e.move_exported_model_to_eval(quantized)
            torch.export.save(torch.export.export(quantized, (images,)), folder / _FILE)

    def _import(self) -> None:
        import torchao.quantization.pt2e
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401


class TorchBfloat16(_Compiled):
    """See `qvit.bench.peers.Peer`."""

    name = "torch-bf16"
    title = "PyTorch bfloat16"
    packages: tuple[str, ...] = ("torch", "timm")
    model = "torch-bf16"

    def prepare(self, model: nn.Module, architecture: Architecture, batch: int, folder: Path) -> None:
        import torch

        images = torch.randn(batch, architecture.in_chans, *architecture.img_size, dtype=torch.bfloat16)
        with torch.no_grad():
            torch.export.save(torch.export.export(model.bfloat16(), (images,)), folder / _FILE)

    def _in(self, images: Any) -> Any:
        return images.bfloat16()
