"""What a GPU must have, and what is said where it does not; drivers and GPUs are played, as there need not be any."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qvit.engines.cuda import compiler, device
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.device import Gpu
from qvit.engines.cuda.tuned import Choice, write
from qvit.errors import InputError, MissingDependencyError, UnsupportedModelError

driver = pytest.importorskip("cuda.bindings.driver")
OK, MEMORY, WRONG = (
    driver.CUresult.CUDA_SUCCESS,
    driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY,
    driver.CUresult.CUDA_ERROR_INVALID_VALUE,
)


NONE, OTHER, OWN = 0, 100, 101  # contexts: of a new thread, of another GPU, of the engine's


class Driver(SimpleNamespace):
    """cuda-bindings' driver, with one answer to all that a kernel is loaded and launched with."""

    def __init__(self) -> None:
        super().__init__(status=OK, launched=[], context=OWN)
        self.CUresult, self.CUdevice_attribute = driver.CUresult, driver.CUdevice_attribute
        self.CUfunction_attribute = driver.CUfunction_attribute

    def cuDeviceGetAttribute(self, wanted: Any, _index: int) -> tuple[Any, int]:
        assert wanted == self.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        return OK, 101_376

    def cuDriverGetVersion(self) -> tuple[Any, int]:
        return OK, 13000

    def cuCtxGetCurrent(self) -> tuple[Any, int]:
        return OK, self.context

    def cuCtxSetCurrent(self, context: int) -> tuple[Any]:
        self.context = context
        return (OK,)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, str]:
        assert code == b"code"
        return self.status, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, str]:
        assert (module, name) == ("module", b"kernel")
        return OK, "function"

    def cuFuncSetAttribute(self, *_arguments: Any) -> tuple[Any]:
        return (OK,)

    def cuLaunchKernel(self, function: str, *shape: Any) -> tuple[Any]:
        self.launched.append((function, *shape[:8]))
        return (OK,)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """One GPU, of compute capability 8.6."""
    import cuda.bindings

    found = Driver()
    monkeypatch.setattr(cuda.bindings, "driver", found)
    monkeypatch.setattr(device, "compile_kernel", lambda *_: b"code")
    monkeypatch.setattr(device, "check_compiler", lambda: None)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda _device: (8, 6),
        "get_device_name": lambda _device: "NVIDIA X1",
        "get_device_properties": lambda _device: SimpleNamespace(multi_processor_count=46),
        "current_stream": lambda _device: SimpleNamespace(cuda_stream=7),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **options: zeros(*shape, **options))
    monkeypatch.setattr(torch.cuda, "device", lambda _device: torch.no_grad())
    return found


@pytest.fixture
def entered(played: Driver, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that PyTorch is told to go to, from when the engine's GPU is open."""
    devices: list[Any] = []

    @contextmanager
    def device(to: torch.device) -> Iterator[None]:
        devices.append(to)
        yield
        devices.append("back")

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def launch() -> Launch:
    return Launch("pool", {}, (3, 2, 1), 128, 0, {"tokens": 4})


def test_what_it_says_of_itself(played: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    gpu = Gpu("cuda")
    assert (str(gpu.device), gpu.architecture, gpu.hopper) == ("cuda:0", "sm_86", False)
    assert (gpu.multiprocessors, gpu.most_shared, gpu.stream) == (46, 101_376, 7)
    assert gpu.tuned.all() == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr("qvit.engines.cuda.tuned.FILES", tmp_path)
    choice = Choice("codes", 100, 64, 64, False, None)
    write(tmp_path / "nvidia-x1.json", "NVIDIA X1", [choice], {})
    gpu = Gpu("cuda:0")
    assert (gpu.architecture, gpu.hopper, gpu.tuned.all()) == ("sm_90a", True, [choice])


def test_gpus_that_are_not_there_or_too_old(played: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^There is no GPU 1: PyTorch finds 1\.$"):
        Gpu("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    with pytest.raises(UnsupportedModelError, match=r"X1 \(compute capability 7\.5\) is older .* use engine='reference'\.$"):
        Gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no GPU that PyTorch can use: use engine='cpu' or engine='reference'\.$"):
        Gpu()


def test_a_missing_compiler_is_found_before_the_first_images(played: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "check_compiler", compiler.check_compiler)

    def missing() -> None:
        raise MissingDependencyError("NVRTC is missing")

    monkeypatch.setattr(compiler, "_nvrtc", missing)
    with pytest.raises(MissingDependencyError, match="NVRTC is missing"):
        Gpu()


def test_kernels_that_are_to_come_are_compiled_together(played: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other."""
    met, compiled = threading.Barrier(2, timeout=30), []

    def compile_kernel(name: str, defines: dict[str, int], architecture: str) -> bytes:
        met.wait()
        compiled.append((name, defines["A"], architecture))
        return b"code"

    monkeypatch.setattr(device, "compile_kernel", compile_kernel)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    gpu = Gpu()
    one, two = (Launch("pool", {"A": a}, (1, 1, 1), 32, 0, {}) for a in (1, 2))
    gpu.compile([one, two, one])
    assert sorted(compiled) == [("pool", 1, "sm_86"), ("pool", 2, "sm_86")]
    gpu.launch(one)
    gpu.compile([two, one])
    gpu.launch(two)
    gpu.compile([one, two])
    assert len(compiled) == len(played.launched) == 2


def test_a_kernel_that_does_not_compile_is_told_beforehand(played: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_kernel(*_: Any) -> bytes:
        raise UnsupportedModelError("The CUDA kernel pool does not compile")

    monkeypatch.setattr(device, "compile_kernel", compile_kernel)
    with pytest.raises(UnsupportedModelError, match="pool does not compile"):
        Gpu().compile([launch()])


def test_a_kernel_is_loaded_once_and_launched_on_the_current_stream(played: Driver) -> None:
    gpu = Gpu()
    for _ in range(2):
        gpu.launch(launch())
    assert played.launched == [("function", 3, 2, 1, 128, 1, 1, 0, 7)] * 2
    assert len(gpu._functions) == 1


def test_kernels_that_do_not_run(played: Driver) -> None:
    gpu = Gpu()
    played.status = WRONG
    with pytest.raises(UnsupportedModelError, match=r"pool does not run on NVIDIA X1 \(CUDA_ERROR_INVALID_VALUE\): use"):
        gpu.launch(launch())
    played.status = MEMORY
    with pytest.raises(torch.OutOfMemoryError, match="kernel pool"):
        gpu.launch(launch())


@pytest.mark.parametrize("before", [OTHER, NONE])
def test_the_engines_gpu_becomes_the_threads(before: int, played: Driver, entered: list[Any]) -> None:
    """Another GPU's thread, and a new one, which has no context."""
    gpu = Gpu()
    entered.clear()
    played.context = before
    with gpu.current():
        assert played.context == OWN
        assert entered == [gpu.device]
    assert entered == [gpu.device, "back"]


def test_nothing_is_done_where_it_is_that_already(played: Driver, entered: list[Any]) -> None:
    gpu = Gpu()
    entered.clear()
    with gpu.current():
        assert played.context == OWN
    assert not entered
