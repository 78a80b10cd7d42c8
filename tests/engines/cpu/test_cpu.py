"""The engine around the kernels: threads, processes, environment, and what it says where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.engines import create_engine, default_engine
from qvit.engines.cpu import CpuEngine, thread_count
from qvit.engines.reference import ReferenceEngine
from qvit.errors import InputError, MissingDependencyError
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec

Factory = Callable[..., Any]


@pytest.fixture(scope="module")
def model(make_student: Factory, small_vit: Factory, perturb: Factory) -> IntegerModel:
    """65 tokens: more than one step of rows, and no multiple of four."""
    options = {"embed_dim": 128, "num_heads": 2, "img_size": 64, "patch_size": 8, "depth": 2}
    return qvit.freeze(perturb(make_student(small_vit(**options))))


@pytest.fixture(scope="module")
def pixels(model: IntegerModel) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, *model.preprocessing.input_size), dtype=np.uint8)


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 32])
def test_neither_threads_nor_batches_matter(threads: int, model: IntegerModel, pixels: np.ndarray) -> None:
    expected = np.concatenate([CpuEngine(model, threads=1).run(image[None]) for image in pixels])
    engine = CpuEngine(model, threads=threads)
    assert engine.threads == threads
    for size in range(1, 8):
        assert np.array_equal(engine.run(pixels[:size]), expected[:size]), size
    codes: dict[str, np.ndarray] = {}
    wanted: dict[str, np.ndarray] = {}
    engine.forward(pixels[:3], codes)
    CpuEngine(model, threads=1).forward(pixels[:3], wanted)
    assert all(np.array_equal(codes[name], wanted[name]) for name in wanted)


def test_strides_and_float_types_do_not_matter(model: IntegerModel, pixels: np.ndarray) -> None:
    engine = CpuEngine(model)
    expected = engine.run(pixels)
    images = model.preprocessing.normalise(pixels)
    for same in (
        pixels[::-1][::-1],
        np.asfortranarray(pixels),
        images,
        images.astype(np.float64),
        np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    ):
        assert np.array_equal(engine.run(same), expected)
    assert engine.run(pixels[:0]).shape == (0, 7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite_are_refused(bad: float, model: IntegerModel, pixels: np.ndarray) -> None:
    images = model.preprocessing.normalise(pixels).astype(np.float64)
    images[1, 0, -1, -1] = bad
    with pytest.raises(InputError, match="not finite"):
        CpuEngine(model).run(images)


def test_concurrent_calls_give_the_same_answers(model: IntegerModel, pixels: np.ndarray) -> None:
    engines = [CpuEngine(model, threads=threads) for threads in (1, 2, 4)]
    expected = engines[0].run(pixels)
    wrong: list[int] = []

    def work(index: int) -> None:
        for call in range(20):
            size = 1 + (index + call) % 7
            if not np.array_equal(engines[index % 3].run(pixels[:size]), expected[:size]):
                wrong.append(call)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def busy(model: IntegerModel, pixels: np.ndarray) -> Iterator[None]:
    """Another thread keeps an engine at work."""
    engine, stop = CpuEngine(model, threads=2), threading.Event()

    def work() -> None:
        while not stop.is_set():
            engine.run(pixels[:1])

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("busy")
def test_a_forked_child_computes_too(model: IntegerModel, pixels: np.ndarray) -> None:
    engine = CpuEngine(model, threads=3)
    expected = engine.run(pixels)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            # The parent's worker threads do not exist here; the child must start its own.
            try:
                same = np.array_equal(engine.run(pixels), expected) and np.array_equal(engine.run(pixels[:1]), expected[:1])
            except BaseException:
                same = False
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(engine.run(pixels), expected)


@pytest.mark.parametrize("name", ["warp", "AVX2", "avx2 "])
def test_an_unknown_instruction_set_is_refused(name: str, model: IntegerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVIT_ISA", name)
    with pytest.raises(
        InputError, match=rf"^QVIT_ISA={name} names no instruction set .* use one of .*generic, or leave it unset"
    ):
        CpuEngine(model)


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVIT_NUM_THREADS", raising=False)
    assert thread_count() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("QVIT_NUM_THREADS", "3")
    assert thread_count() == 3
    assert thread_count(2) == 2
    for bad in (0, -1, 2000, "two", 1.5, True):
        with pytest.raises(InputError, match=f"^threads={bad} is no number of threads: use 1 to 1024"):
            thread_count(bad)  # type: ignore[arg-type]
    monkeypatch.setenv("QVIT_NUM_THREADS", "many")
    with pytest.raises(InputError, match=r"^QVIT_NUM_THREADS=many is no number of threads"):
        thread_count()


def test_without_the_compiled_module(model: IntegerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_engine() == "cpu"
    monkeypatch.delattr("qvit.engines.cpu._native", raising=False)
    monkeypatch.setitem(sys.modules, "qvit.engines.cpu._native", None)
    assert default_engine() == "reference"
    assert create_engine(model).name == "reference"
    with pytest.raises(MissingDependencyError, match=r"compiled module is missing .* install qvit with pip"):
        create_engine(model, "cpu")


def test_the_default_engine_follows_the_device(model: IntegerModel) -> None:
    assert default_engine("cpu") == "cpu"
    assert default_engine("cuda") == "cuda"
    assert create_engine(model).name == "cpu"
    with pytest.raises(InputError, match="The engine 'cpu' does not run on the device 'cuda'"):
        create_engine(model, "cpu", "cuda")


def test_a_profile_is_kept_when_asked_for(model: IntegerModel, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CpuEngine(model)
    engine.run(pixels)
    assert set(engine.profile().values()) == {0.0}
    monkeypatch.setenv("QVIT_PROFILE", "1")
    engine = CpuEngine(model, threads=2)
    engine.run(pixels)
    times = engine.profile()
    assert times["integer products"] > 0
    assert times["attention"] > 0
    assert set(engine.profile().values()) == {0.0}
    assert set(engine.kernels) == {"patch_embed", "qkv", "proj", "fc1", "fc2", "head"}


def test_it_needs_numpy_alone(model: IntegerModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m.qvit")
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'timm', 'torchvision', 'scipy', 'sklearn']))\n"
        "import numpy as np, qvit\n"
        f"run = qvit.load({str(tmp_path / 'm.qvit')!r})\n"
        "assert run.engine.name == 'cpu'\n"
        "print(run(np.zeros((1, 3, 64, 64), np.uint8)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 7)", done.stderr


@pytest.mark.parametrize("isa", ["", "avx2", "generic"])
@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0, 3000.0, 1e6])
def test_codes_of_rows_whose_mean_is_far_from_zero(
    mean: float, isa: str, make_student: Factory, small_vit: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean of float32 loses digits that LayerNorm's gain makes visible; IRM's q and k have biases as large."""
    monkeypatch.setenv("QVIT_ISA", isa)
    options = {"embed_dim": 96, "num_heads": 3, "img_size": 64, "patch_size": 8, "depth": 1}
    model = qvit.freeze(perturb(make_student(small_vit(**options), spec=ModelSpec.of_bits(4))))
    object.__setattr__(model, "pos_embed", (model.pos_embed + np.float32(mean)).astype(np.float32))
    assert model.blocks[0].qkv.bias is not None
    model.blocks[0].qkv.bias[:192] += np.float32(mean)
    images = model.preprocessing.normalise(
        np.random.default_rng(0).integers(0, 256, (16, *model.preprocessing.input_size), dtype=np.uint8)
    )
    wanted: dict[str, Any] = {}
    ReferenceEngine(model).forward(torch.from_numpy(images), wanted)
    codes: dict[str, np.ndarray] = {}
    CpuEngine(model).forward(images, codes)
    for point in ("qkv.input", "q", "k"):
        name = f"blocks.0.attn.{point}"
        assert np.array_equal(codes[name], wanted[name].numpy()), point
