"""ONNX Runtime with int8 weights and activations quantized as it runs ("dynamic"), its fastest int8 for vision transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvit.architecture import Architecture, VitArchitecture

if TYPE_CHECKING:
    from torch import nn

    from qvit.bench.peers import Predict

_OPSET = 23  # the first with an Attention operator


class OnnxRuntimeInt8:
    """See `qvit.bench.peers.Peer`."""

    name = "onnxruntime"
    title = "ONNX Runtime int8"
    packages: tuple[str, ...] = ("onnxruntime", "onnx", "onnxscript", "torch", "timm")
    model = "onnxruntime"
    device = "cpu"
    any_batch = False

    def prepare(self, model: nn.Module, architecture: Architecture, batch: int, folder: Path) -> None:
        """Exports, fuses attention, GELU and LayerNorm, then quantizes.

        In this order, and with the optimisation inside the quantizer's preprocessing off: it would undo the fusions.
        """
        import torch
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        # 0: the optimizer reads the number off each attention.
        heads = architecture.num_heads if isinstance(architecture, VitArchitecture) else 0
        images = torch.randn(batch, architecture.in_chans, *architecture.img_size)
        with tempfile.TemporaryDirectory() as scratch:
            exported, fused, prepared = (f"{scratch}/{name}.onnx" for name in ("exported", "fused", "prepared"))
            torch.onnx.export(
                model,
                (images,),
                exported,
                input_names=["images"],
                output_names=["logits"],
                opset_version=_OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            optimizer.optimize_model(
                exported,
                model_type="vit",
                num_heads=heads,
                hidden_size=architecture.embed_dim,
                opt_level=0,
                optimization_options=FusionOptions("vit"),
            ).save_model_to_file(fused)
            quant_pre_process(fused, prepared, skip_symbolic_shape=True, skip_optimization=True)
            quantize_dynamic(
                prepared,
                folder / "model.onnx",
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm"],
                extra_options={"MatMulConstBOnly": True},
            )

    def load(self, folder: Path, batch: int, threads: int) -> Predict:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

        def predict(images: np.ndarray) -> np.ndarray:
            return session.run(None, {"images": images})[0]

        return predict
