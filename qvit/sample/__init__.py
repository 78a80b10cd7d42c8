"""The model that comes with the package: DeiT-T at 4 bits, trained on Imagenette (README.md in this folder is its card)."""

from __future__ import annotations

from pathlib import Path

SAMPLE = Path(__file__).parent / "deit_tiny_imagenette_w4a4.qvit"


def sample_model() -> Path:
    """The file, for `qvit.load`: ten classes of ImageNet, RGB images of 224 x 224."""
    return SAMPLE
