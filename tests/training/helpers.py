"""Small images that can be learned, and a recipe that trains on them in a moment."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qvit.training.loop

CLASSES = ("blue", "green", "red")
TRAIN, VAL = 40, 11  # images; neither is a multiple of anything convenient


def write_images(root: Path, count: int, seed: int) -> Path:
    """``root/<class>/<n>.png``: 8 x 8 noise that is brightest in its class's channel."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % len(CLASSES)
        pixels = rng.integers(0, 160, (8, 8, 3))
        pixels[..., 2 - label] += 95
        folder = root / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    return root


def tiny_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """The keys of a recipe that trains 3 epochs of 5 steps; sections in ``changes`` are merged into it."""
    args = {"img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 24, "depth": 2, "num_heads": 2}
    values: dict[str, Any] = {
        "method": "qvit",
        "model": {"name": "vit_tiny_patch16_224", "args": args},
        "data": {"train": str(folder), "workers": 0, "augment": {"scale": [0.5, 1.0]}, "crop_pct": 1.0},
        "quant": {"bits": 3, "calibration_images": 16},
        "optim": {"lr": 2e-3, "weight_decay": 0.05, "clip_grad": 1.0},
        "schedule": {"epochs": 3, "warmup_epochs": 0.5},
        "batch_size": 8,
        "log_every": 1,
    }
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
    return values


def environment() -> dict[str, str]:
    """Of a program that trains on the CPU."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def interrupt_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Training gets a Ctrl-C when it asks for the learning rate for the ``step``-th time, until the patch is undone."""
    original, calls = qvit.training.loop.learning_rate, []

    def interrupting(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(qvit.training.loop, "learning_rate", interrupting)
