"""The model that comes with the package: DeiT-T at 4 bits, trained on Imagenette (README.md in this folder is its card)."""

from __future__ import annotations

from pathlib import Path

# For `qvit.load`: ten classes of ImageNet, RGB images of 224 x 224.
SAMPLE = Path(__file__).parent / "deit_tiny_imagenette_w4a4.qvit"
