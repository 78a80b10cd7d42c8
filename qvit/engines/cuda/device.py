"""Loads compiled kernels on a GPU and launches them on PyTorch's current stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.compiler import check_compiler, compile_kernel
from qvit.engines.cuda.tuned import Tuned, tuned_for
from qvit.errors import InputError, MissingDependencyError, UnsupportedModelError

_SHARED_BY_DEFAULT = 48 * 1024
# Shared memory's part of the first-level cache, in percent, of every kernel the same: a multiprocessor must be empty to change
# it, and blocks of two kernels could not meet there.
_CARVEOUT = 100
_OVERLAP_CAPABILITY, _OVERLAP_DRIVER = 9, 12030  # what programmatic dependent launch in a CUDA graph needs at least

Queue = Callable[[Any], None]  # queues a kernel on a stream

_NOTHING = nullcontext()


class Device(Protocol):
    """What runs launches."""

    device: torch.device
    multiprocessors: int
    most_shared: int  # bytes of shared memory that a block may have
    hopper: bool  # has warpgroup products and bulk copies (compute capability 9)
    tuned: Tuned  # tiles that are the fastest on it

    @property
    def stream(self) -> Any:
        """The current one."""
        ...

    def current(self) -> AbstractContextManager[object]:
        """Within it, the calling thread may queue what has been `prepared`, record it and replay it."""
        ...

    def compile(self, launches: Iterable[Launch]) -> None:
        """Compiles the kernels of launches that are to come, as many at once as there are cores."""
        ...

    def launch(self, launch: Launch, behind: bool = False) -> None:
        """Runs a kernel, or queues it.

        Args:
            launch: the kernel.
            behind: whether it may begin before the kernel queued before it has ended, which must be one of ``src``.
        """
        ...

    def prepared(self, launch: Launch, behind: bool = False) -> Queue:
        """`launch` on a stream, again and again: all that can be done beforehand is done. Within `current`."""
        ...


class Gpu:
    """An NVIDIA GPU.

    Args:
        device: ``cuda`` or ``cuda:<n>``.

    Raises:
        InputError: there is no such GPU.
        UnsupportedModelError: the GPU is older than Ampere.
        MissingDependencyError: cuda-bindings or NVRTC is not installed.
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
        check_compiler()  # now, and not when the first images come
        self.hopper = major == 9
        self.architecture = f"sm_{major}{minor}{'a' if self.hopper else ''}"
        self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.tuned = tuned_for(self.name)
        self._driver = driver
        with torch.cuda.device(self.device):
            torch.zeros(1, device=self.device)  # makes PyTorch's context
            self._context = driver.cuCtxGetCurrent()[1]
        most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.most_shared = int(driver.cuDeviceGetAttribute(most, index)[1])
        self._overlaps = major >= _OVERLAP_CAPABILITY and driver.cuDriverGetVersion()[1] >= _OVERLAP_DRIVER
        self._functions: dict[str, Any] = {}
        self._compiled: dict[str, bytes] = {}  # what has not been loaded yet

    @property
    def name(self) -> str:
        """The GPU's name, as its driver gives it."""
        return torch.cuda.get_device_name(self.device)

    @property
    def stream(self) -> int:
        """PyTorch's current one, as the driver knows it."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def current(self) -> AbstractContextManager[object]:
        """See `Device`: kernels are loaded and launched in the thread's context, which may be another GPU's, or none at all."""
        return _NOTHING if int(self._driver.cuCtxGetCurrent()[1]) == int(self._context) else self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with torch.cuda.device(self.device):  # does nothing where a new thread has this GPU by default, but no context yet
            self._driver.cuCtxSetCurrent(self._context)
            yield

    def compile(self, launches: Iterable[Launch]) -> None:
        """See `Device`: NVRTC gives the interpreter back."""
        known = self._functions.keys() | self._compiled.keys()
        new = {launch.code: launch for launch in launches if launch.code not in known}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._compiled |= zip(new, pool.map(self._code, new.values()), strict=True)

    def launch(self, launch: Launch, behind: bool = False) -> None:
        """Queues a kernel on the current stream; see `Device`."""
        with self.current():
            self.prepared(launch, behind)(self.stream)

    def prepared(self, launch: Launch, behind: bool = False) -> Queue:
        """See `Device`."""
        function = self._functions.get(launch.code) or self._load(launch)
        driver, arguments = self._driver, launch.arguments  # which live as long as the launch: it is kept for `check`
        if behind and self._overlaps:
            config, last = self._overlapping(launch), [0]

            def queue(stream: int) -> None:
                if stream != last[0]:
                    config.hStream = last[0] = stream
                (status,) = driver.cuLaunchKernelEx(config, function, arguments, 0)
                self._check(status, launch.kernel)

            return queue
        shape = (*launch.grid, launch.threads, 1, 1, launch.shared)

        def queue_alone(stream: int) -> None:
            (status,) = driver.cuLaunchKernel(function, *shape, stream, arguments, 0)
            self._check(status, launch.kernel)

        return queue_alone

    def _overlapping(self, launch: Launch) -> Any:
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
        config.sharedMemBytes = launch.shared
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def _code(self, launch: Launch) -> bytes:
        return compile_kernel(launch.kernel, launch.defines, self.architecture)

    def _load(self, launch: Launch) -> Any:
        code = self._compiled.pop(launch.code, None) or self._code(launch)
        status, module = self._driver.cuModuleLoadData(code)
        self._check(status, launch.kernel)
        status, function = self._driver.cuModuleGetFunction(module, b"kernel")
        self._check(status, launch.kernel)
        attributes = self._driver.CUfunction_attribute
        if launch.shared > _SHARED_BY_DEFAULT:
            most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (status,) = self._driver.cuFuncSetAttribute(function, most, launch.shared)
            self._check(status, launch.kernel)
        preferred = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        (status,) = self._driver.cuFuncSetAttribute(function, preferred, _CARVEOUT)
        self._check(status, launch.kernel)
        self._functions[launch.code] = function
        return function

    def _check(self, status: Any, kernel: str) -> None:
        if int(status) == int(self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(f"CUDA out of memory with the kernel {kernel}.")  # as PyTorch's allocator says it
        if int(status) != 0:
            raise UnsupportedModelError(
                f"The CUDA kernel {kernel} does not run on {self.name} ({status.name}): use engine='reference'."
            )
