"""OpenVINO on a model that NNCF quantized to int8 after training: the fastest int8 we know on x86."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvit.architecture import Architecture

if TYPE_CHECKING:
    from torch import nn

    from qvit.bench.peers import Predict

_CALIBRATION_IMAGES = 8


class OpenVinoInt8:
    """See `qvit.bench.peers.Peer`.

    Args:
        rest: precision of what is not int8, OpenVINO's INFERENCE_PRECISION_HINT: ``f32``, or ``bf16``, which is a little faster
            and uses less memory where the processor has it.
    """

    packages: tuple[str, ...] = ("openvino", "nncf", "torch", "timm")
    model = "openvino"
    device = "cpu"
    any_batch = False

    def __init__(self, rest: str = "f32") -> None:
        self.rest = rest
        self.name = "openvino" if rest == "f32" else f"openvino-{rest}"
        self.title = "OpenVINO int8" if rest == "f32" else f"OpenVINO int8, rest {rest}"

    def prepare(self, model: nn.Module, architecture: Architecture, batch: int, folder: Path) -> None:
        """Converts with a fixed batch; NNCF's settings for transformers, which quantize attention too."""
        import nncf
        import openvino
        import torch

        shape = (batch, architecture.in_chans, *architecture.img_size)
        with torch.no_grad():
            converted = openvino.convert_model(model, example_input=torch.randn(shape), input=list(shape))
        rng = np.random.default_rng(0)
        images = [rng.standard_normal(shape, dtype=np.float32) for _ in range(max(1, _CALIBRATION_IMAGES // batch))]
        quantized = nncf.quantize(
            converted,
            nncf.Dataset(images),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
            fast_bias_correction=True,
        )
        openvino.save_model(quantized, folder / "model.xml")

    def load(self, folder: Path, batch: int, threads: int) -> Predict:
        """One stream with all threads: the setting for latency, which is also the faster one at batch 8."""
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.rest,
        }
        request = openvino.Core().compile_model(folder / "model.xml", "CPU", settings).create_infer_request()

        def predict(images: np.ndarray) -> np.ndarray:
            request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
            request.infer()
            return request.get_output_tensor().data

        return predict
