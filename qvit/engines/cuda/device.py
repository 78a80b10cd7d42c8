"""Loads compiled kernels on a GPU and launches them on PyTorch's current stream."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.compiler import compile_kernel
from qvit.engines.cuda.tuned import Tuned, tuned_for
from qvit.errors import InputError, MissingDependencyError, UnsupportedModelError

_SHARED_BY_DEFAULT = 48 * 1024
_OVERLAP_CAPABILITY, _OVERLAP_DRIVER = 9, 12030  # what programmatic dependent launch in a CUDA graph needs at least


class Device(Protocol):
    """What runs launches."""

    device: torch.device
    multiprocessors: int
    hopper: bool  # has warpgroup products and bulk copies (compute capability 9)
    tuned: Tuned  # tiles that are the fastest on it

    def launch(self, launch: Launch, behind: bool = False) -> None:
        """Runs a kernel, or queues it.

        Args:
            launch: the kernel.
            behind: whether it may begin before the kernel queued before it has ended, which must be one of ``src``.
        """
        ...


class Gpu:
    """An NVIDIA GPU.

    Args:
        device: ``cuda`` or ``cuda:<n>``.

    Raises:
        InputError: there is no such GPU.
        UnsupportedModelError: the GPU is older than Ampere.
        MissingDependencyError: cuda-bindings is not installed.
    """

    def __init__(self, device: str | torch.device = "cuda") -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise MissingDependencyError(
                f"The CUDA engine needs cuda-bindings ({error}): pip install cuda-bindings, or use engine='reference'."
            ) from None
        wanted = torch.device(device)
        if not torch.cuda.is_available():
            raise InputError("There is no GPU that PyTorch can use: use engine='cpu' or engine='reference'.")
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise InputError(f"There is no GPU {index}: PyTorch finds {torch.cuda.device_count()}.")
        self.device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(self.device)
        if major < 8:
            raise UnsupportedModelError(
                f"{torch.cuda.get_device_name(self.device)} (compute capability {major}.{minor}) is older than the CUDA "
                "engine's kernels: they need 8.0 (Ampere) or later; use engine='reference'."
            )
        self.hopper = major == 9
        self.architecture = f"sm_{major}{minor}{'a' if self.hopper else ''}"
        self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.tuned = tuned_for(self.name)
        torch.zeros(1, device=self.device)  # makes PyTorch's context
        self._driver = driver
        self._overlaps = major >= _OVERLAP_CAPABILITY and driver.cuDriverGetVersion()[1] >= _OVERLAP_DRIVER
        self._functions: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The GPU's name, as its driver gives it."""
        return torch.cuda.get_device_name(self.device)

    def launch(self, launch: Launch, behind: bool = False) -> None:
        """Queues a kernel on the current stream; see `Device`."""
        function = self._functions.get(launch.code) or self._load(launch)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if behind and self._overlaps:
            (status,) = self._driver.cuLaunchKernelEx(self._overlapping(launch, stream), function, launch.arguments, 0)
        else:
            (status,) = self._driver.cuLaunchKernel(
                function, *launch.grid, launch.threads, 1, 1, launch.shared, stream, launch.arguments, 0
            )
        self._check(status, launch.kernel)

    def _overlapping(self, launch: Launch, stream: int) -> Any:
        """How a kernel is launched that waits by itself for the one before (`await_former_kernel` in ``src/warp.cuh``)."""
        driver = self._driver
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = value
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared, stream
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def _load(self, launch: Launch) -> Any:
        with torch.cuda.device(self.device):
            code = compile_kernel(launch.kernel, launch.defines, self.architecture)
            status, module = self._driver.cuModuleLoadData(code)
            self._check(status, launch.kernel)
            status, function = self._driver.cuModuleGetFunction(module, b"kernel")
            self._check(status, launch.kernel)
            if launch.shared > _SHARED_BY_DEFAULT:
                attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (status,) = self._driver.cuFuncSetAttribute(function, attribute, launch.shared)
                self._check(status, launch.kernel)
        self._functions[launch.code] = function
        return function

    def _check(self, status: Any, kernel: str) -> None:
        if int(status) != 0:
            raise UnsupportedModelError(
                f"The CUDA kernel {kernel} does not run on {self.name} ({status.name}): use engine='reference'."
            )
