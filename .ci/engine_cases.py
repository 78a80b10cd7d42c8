"""Writes small integer models with images, codes and logits of the reference engine, for `engine_check.py` to compare with.

Usage: ``python .ci/engine_cases.py FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import qvit
from qvit.engines import create_engine
from qvit.spec import ModelSpec

SIZES: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 60, "num_heads": 3, "depth": 2, "num_classes": 11}
SWIN: dict[str, Any] = {
    "img_size": 48,
    "window_size": 3,
    "embed_dim": 24,
    "num_heads": (3, 2),
    "depths": (2, 1),
    "num_classes": 11,
}
CASES: dict[str, tuple[str, dict[str, Any], ModelSpec]] = {
    "w2a2": ("deit_tiny_patch16_224", {}, ModelSpec.of_bits(2)),
    "w3a3": ("deit_tiny_distilled_patch16_224", {}, ModelSpec.of_bits(3)),
    "w4a4": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, ModelSpec.of_bits(4)),
    "w8a8": ("deit_tiny_patch16_224", {"init_values": 0.1}, ModelSpec.of_bits(8, rectify=False)),
    "w2a8": ("deit_tiny_patch16_224", {"patch_size": 16}, ModelSpec(weight_bits=2, act_bits=8)),
    "w4a4-float16": ("vit_tiny_patch16_224", {"init_values": 0.1, "pre_norm": True}, ModelSpec(residual="float16")),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, ModelSpec.of_bits(4)),
    "swin-float16": ("swin_tiny_patch4_window7_224", SWIN, ModelSpec(residual="float16")),
}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (architecture, options, spec) in CASES.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, **(options if options is SWIN else SIZES | options)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        student = qvit.quantize(model, spec=spec)
        pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 48, 48), dtype=np.uint8)
        images = torch.from_numpy(student.qvit.preprocessing.normalise(pixels))
        qvit.calibrate(student, [images], images=len(images))
        frozen = qvit.freeze(student)
        frozen.save(folder / f"{name}.qvit")
        codes: dict[str, torch.Tensor] = {}
        logits = create_engine(frozen, "reference").forward(images, codes)
        arrays = {point: values.numpy() for point, values in codes.items()}
        np.savez(folder / f"{name}.npz", pixels=pixels, logits=logits.numpy(), **arrays)


if __name__ == "__main__":
    main()
