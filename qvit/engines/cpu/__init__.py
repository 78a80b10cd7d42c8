"""The CPU engine: compiled kernels over packed 2, 3, 4 and 8-bit codes; needs NumPy alone.

Same model, same codes as `qvit.engines.reference`: integer sums are equal bit for bit, and the float steps (LayerNorm, softmax,
GELU, rectify) are the correctly rounded ones (`qvit.quantizers.exact_float`).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.engines.cpu import digest
from qvit.errors import InputError, MissingDependencyError, StaleBuildError
from qvit.integer.model import IntegerModel

if TYPE_CHECKING:
    import torch


def is_built() -> bool:
    """Whether this installation has the compiled module."""
    try:
        import qvit.engines.cpu._native  # noqa: F401
    except ImportError:
        return False
    return True


def _load() -> Any:
    """The compiled module; raises what `CpuEngine` says.

    An old module would pass over what it does not know of a model, compute other answers, and say nothing.
    """
    try:
        from qvit.engines.cpu import _native
    except ImportError as error:
        raise MissingDependencyError(
            f"The CPU engine's compiled module is missing ({error}): install qvit with pip where there is a C++ compiler."
        ) from None
    if not digest.is_current(getattr(_native, "sources", None)):
        raise StaleBuildError(
            f"The compiled CPU engine was not made from {digest.SOURCES} as it is now: install qvit again (pip install -e .)."
        )
    return _native


class CpuEngine:
    """Runs an `IntegerModel` with the compiled kernels.

    Args:
        model: the frozen model.
        threads: cores that one call uses, by default the environment variable ``QVIT_NUM_THREADS``, else the usable cores.
            Results do not depend on it. Calls from several Python threads at once are safe: all engines of a process share
            one set of worker threads.

    The environment variable ``QVIT_ISA`` forces the instruction set (``avx512vnni``, ``avx2``, ``neon``, ``generic``), and
    ``QVIT_PROFILE=1`` keeps times (`profile`).

    Raises:
        MissingDependencyError: the compiled module was not built.
        StaleBuildError: it was built from other sources than this checkout has.
        InputError: ``threads`` or an environment variable is none of the possible values.
        UnsupportedModelError: a head is wider than 512 channels, or there are more than 65,536 tokens.
    """

    name = "cpu"
    takes_pixels = True  # uint8 images as they are: they are the codes of the patch embedding

    def __init__(self, model: IntegerModel, threads: int | None = None) -> None:
        _native = _load()
        from qvit.engines.cpu.build import build

        self.model = model
        isa = os.environ.get("QVIT_ISA", "")
        try:
            _native.choose_isa(isa)
        except ValueError as error:
            raise InputError(str(error)) from None
        builder = build(_native.Builder, isa, model)
        self._engine = _native.Engine(builder, thread_count(threads), os.environ.get("QVIT_PROFILE", "") not in ("", "0"))

    @property
    def threads(self) -> int:
        """Cores that one call uses at most."""
        return int(self._engine.threads)

    @property
    def isa(self) -> str:
        """The instruction set that runs: ``avx512vnni``, ``avx2``, ``neon`` or ``generic``."""
        return str(self._engine.isa)

    @property
    def kernels(self) -> dict[str, str]:
        """Layer (of the first block, the patch embedding and the head) -> name of its matrix kernel."""
        return dict(self._engine.kernels)

    def profile(self) -> dict[str, float]:
        """Phase -> seconds since the last call of this method, summed over threads; zeros without ``QVIT_PROFILE=1``."""
        return dict(self._engine.profile())

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images [B, C, H, W], uint8 pixels or normalised float32 -> logits [B, classes], float32.

        Raises:
            InputError: values that are not finite.
        """
        return self._run(images, None)

    def forward(
        self, images: np.ndarray | torch.Tensor, codes: MutableMapping[str, Any] | None = None
    ) -> np.ndarray | torch.Tensor:
        """`run`, in arrays or tensors; slower where it shows its codes.

        Args:
            images: [B, C, H, W], an array or a tensor on the CPU.
            codes: if given, filled with the codes at every activation point by name (int16), of the images' kind.
        """
        if isinstance(images, np.ndarray):
            return self._run(images, codes)
        import torch

        taps: dict[str, np.ndarray] | None = None if codes is None else {}
        logits = torch.from_numpy(self._run(images.detach().cpu().numpy(), taps))
        if codes is not None and taps is not None:
            codes.update({name: torch.from_numpy(array) for name, array in taps.items()})
        return logits

    def _run(self, images: np.ndarray, codes: MutableMapping[str, Any] | None) -> np.ndarray:
        if images.dtype != np.uint8:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is refused below
                images = images.astype(np.float32, copy=False)
        images = np.ascontiguousarray(images)
        logits = np.empty((len(images), self.model.architecture.num_classes), np.float32)
        taps = None
        if codes is not None:
            from qvit.engines.cpu.build import tap_shapes

            taps = {name: np.empty(shape, np.int16) for name, shape in tap_shapes(self.model, len(images)).items()}
            codes.update(taps)
        if not self._engine.run(images, logits, None if taps is None else list(taps.values())):
            raise InputError("The images hold values that are not finite (NaN or infinity).")
        return logits


def thread_count(threads: int | None = None) -> int:
    """The number of threads: the argument, else ``QVIT_NUM_THREADS``, else the cores that this process may use."""
    given: object = threads if threads is not None else os.environ.get("QVIT_NUM_THREADS") or None
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = "QVIT_NUM_THREADS" if threads is None else "threads"
    try:
        count = int(str(given))
    except ValueError:
        count = 0
    if isinstance(given, bool) or not 1 <= count <= 1024:
        raise InputError(f"{name}={given} is no number of threads: use 1 to 1024.")
    return count
