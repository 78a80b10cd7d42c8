"""Random numbers that depend on what they are drawn for, and on nothing that ran before."""

from __future__ import annotations

import random
import struct
from hashlib import blake2b

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^63) from several integers; any change of any of them gives an unrelated one."""
    digest = blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_sample(seed: int, epoch: int, image: int, repeat: int) -> None:
    """Seeds Python, NumPy and PyTorch (CPU) for the augmentation of one image."""
    value = derive_seed(seed, epoch, image, repeat)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    # The CPU generator alone: a loader process must not touch a GPU.
    torch.random.default_generator.manual_seed(value)


def seed_everything(*parts: int) -> None:
    """Seeds every generator, GPUs included, for what the integers name, such as (seed, step, rank) of a training step."""
    value = derive_seed(*parts)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)
