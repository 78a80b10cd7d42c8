"""The peers that an engine is compared with: one file each on the CPU, one for all that run on a GPU.

A peer runs the architecture of the integer model, with random weights and at its own best precision. To add one, write a class
with the members of `Peer` and name it in `PEERS`; imports of what it needs belong into its methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qvit.architecture import Architecture
from qvit.bench.peers.gpu import GPU_PEERS, TorchOnGpu
from qvit.bench.peers.onnxruntime import OnnxRuntimeInt8
from qvit.bench.peers.openvino import OpenVinoInt8
from qvit.bench.peers.torch import TorchBfloat16, TorchInt8
from qvit.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Predict = Callable[[np.ndarray], np.ndarray]
_PLACES = {"cpu": "the CPU", "cuda": "a GPU"}


class Peer(Protocol):
    """A way to run a float vision transformer on the CPU; those on a GPU are `qvit.bench.peers.gpu.TorchOnGpu`.

    Attributes:
        name: as ``--vs`` names it.
        title: for tables.
        packages: import names of what it needs.
        model: name of what `prepare` writes; peers that share it have equal `prepare`.
        device: ``cpu``, or ``cuda`` where `load` takes a device and its function tensors there.
        any_batch: whether what `prepare` writes does not depend on the batch.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    model: str
    device: str
    any_batch: bool

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


AnyPeer = Peer | TorchOnGpu
_CPU_PEERS: tuple[Peer, ...] = (OpenVinoInt8(), OpenVinoInt8("bf16"), OnnxRuntimeInt8(), TorchInt8(), TorchBfloat16())
_ALL: tuple[AnyPeer, ...] = (*_CPU_PEERS, *GPU_PEERS)
PEERS = {peer.name: peer for peer in _ALL}
# Without --vs: the fastest that we know.
USUAL_PEERS = {"cpu": ("openvino", "onnxruntime"), "cuda": ("compile", "torchao")}


def peer_named(name: str) -> AnyPeer:
    """The peer of that name; raises `InputError` where there is none."""
    if name not in PEERS:
        raise InputError(f"There is no peer {name!r} to compare with: use some of {', '.join(PEERS)}.")
    return PEERS[name]


def peers_on(device: str, names: Iterable[str] | None = None) -> list[AnyPeer]:
    """The peers of these names, each once.

    Args:
        device: ``cpu`` or ``cuda``, where the engine runs.
        names: `USUAL_PEERS` of the device by default.

    Raises:
        InputError: there is no such peer, or it runs elsewhere.
    """
    peers = [peer_named(name) for name in dict.fromkeys(USUAL_PEERS[device] if names is None else names)]
    for peer in peers:
        if peer.device != device:
            here = ", ".join(other.name for other in PEERS.values() if other.device == device)
            raise InputError(f"The peer {peer.name} does not run on {_PLACES[device]}, as the engine does: use some of {here}.")
    return peers


def missing_packages(peer: AnyPeer) -> list[str]:
    """Import names of what the peer needs and is not installed; imports nothing."""
    return [name for name in peer.packages if not is_installed(name)]


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:  # where a test has put None in its place
        return False
