"""The peers that an engine is compared with, one file each.

A peer runs the architecture of the integer model, with random weights and at its own best precision. To add one, write a class
with the members of `Peer` and name it in `PEERS`; imports of what it needs belong into its methods.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qvit.architecture import Architecture
from qvit.bench.peers.onnxruntime import OnnxRuntimeInt8
from qvit.bench.peers.openvino import OpenVinoInt8
from qvit.bench.peers.torch import TorchBfloat16, TorchInt8
from qvit.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Predict = Callable[[np.ndarray], np.ndarray]


class Peer(Protocol):
    """A way to run a float vision transformer.

    Attributes:
        name: as ``--vs`` names it.
        title: for tables.
        packages: import names of what it needs.
        model: name of what `prepare` writes; peers that share it have equal `prepare`.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    model: str

    def prepare(self, model: nn.Module, architecture: Architecture, batch: int, folder: Path) -> None:
        """Writes what `load` reads into an empty folder, and nothing else; runs in a process that is not measured.

        Args:
            model: float, in evaluation mode, of the architecture.
            architecture: what it looks like.
            batch: images a call.
            folder: where to write.
        """
        ...

    def load(self, folder: Path, batch: int, threads: int) -> Predict:
        """Reads what `prepare` wrote -> a function of normalised float32 images [batch, C, H, W] to logits [batch, classes]."""
        ...


_ALL: tuple[Peer, ...] = (OpenVinoInt8(), OpenVinoInt8("bf16"), OnnxRuntimeInt8(), TorchInt8(), TorchBfloat16())
PEERS = {peer.name: peer for peer in _ALL}


def peer_named(name: str) -> Peer:
    """The peer of that name; raises `InputError` where there is none."""
    if name not in PEERS:
        raise InputError(f"There is no peer {name!r} to compare with: use some of {', '.join(PEERS)}.")
    return PEERS[name]


def missing_packages(peer: Peer) -> list[str]:
    """Import names of what the peer needs and is not installed; imports nothing."""
    return [name for name in peer.packages if not is_installed(name)]


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:  # where a test has put None in its place
        return False
