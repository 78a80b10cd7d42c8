"""What only a GPU can show: models of real size, CUDA graphs, streams, the absence of waiting, the cache of kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.bench.ceilings import Ceilings, measure_ceilings
from qvit.bench.kernels import kernel_rows
from qvit.engines import create_engine
from qvit.engines.cuda import CudaEngine
from qvit.engines.cuda.attention_blocks import most_tokens
from qvit.engines.cuda.device import Gpu
from qvit.engines.reference import ReferenceEngine
from qvit.errors import InputError, SlowerWarning, UnsupportedModelError
from qvit.integer.model import IntegerModel

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SECOND_PROCESS = """
import sys, torch
from qvit.engines.cuda import compiler
if sys.argv[3] == "no compiler":
    compiler._compile = None
import qvit
runner = qvit.load(sys.argv[1], engine="cuda")
torch.save(runner(torch.load(sys.argv[2]).cuda()).cpu(), sys.argv[2] + ".logits")
"""


@pytest.fixture(scope="module")
def models(perturb: Callable[..., Any]) -> Callable[[int], IntegerModel]:
    """``models(bits)``: two blocks of DeiT-T with distillation token at 224 x 224, calibrated and moved away from there."""
    made: dict[int, IntegerModel] = {}

    def make(bits: int) -> IntegerModel:
        if bits not in made:
            torch.manual_seed(bits)
            model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2).cuda()
            student = qvit.quantize(model, bits=bits)
            preprocessing = student.qvit.preprocessing
            images = torch.from_numpy(preprocessing.normalise(pixels_for(preprocessing.input_size, 8).cpu().numpy())).cuda()
            qvit.calibrate(student, [images], images=8)
            made[bits] = qvit.freeze(perturb(student))
        return made[bits]

    return make


def pixels_for(size: tuple[int, ...], count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, *size), dtype=torch.uint8).cuda()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_is_the_reference_engines(bits: int, models: Callable[[int], IntegerModel]) -> None:
    model = models(bits)
    pixels = pixels_for(model.preprocessing.input_size, 16)
    images = torch.from_numpy(model.preprocessing.normalise(pixels.cpu().numpy())).cuda()
    wanted: dict[str, torch.Tensor] = {}
    codes: dict[str, torch.Tensor] = {}
    expected = ReferenceEngine(model, "cuda").forward(images, wanted)
    engine = CudaEngine(model)
    logits = engine.forward(pixels, codes)
    assert codes.keys() == wanted.keys()
    for name, code in wanted.items():
        assert torch.equal(codes[name], code), f"{name}: {100 * float((codes[name] == code).float().mean()):.4f} % equal"
    assert torch.equal(logits, expected)
    # A CUDA graph's replays are the launches that it recorded, for pixels and for floats.
    for same in (pixels, images, pixels):
        assert torch.equal(engine.forward(same), logits)


def test_many_batch_sizes_in_turn(models: Callable[[int], IntegerModel]) -> None:
    """More than are kept: buffers and graphs are made again."""
    model = models(4)
    engine = CudaEngine(model)
    pixels = pixels_for(model.preprocessing.input_size, 256)
    expected = engine.forward(pixels)
    for batch in (1, 3, 256, 7, 2, 64, 1, 31, 3, 255):
        assert torch.equal(engine.forward(pixels[-batch:]), expected[-batch:]), batch
    assert len(engine._plans) <= 4


def test_it_does_not_wait_for_the_gpu(models: Callable[[int], IntegerModel]) -> None:
    model = models(4)
    runner = qvit.engines.Runner(model, create_engine(model, "cuda"))
    pixels = pixels_for(model.preprocessing.input_size, 4)
    expected = runner(pixels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = [runner(pixels) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, expected) for one in logits)  # type: ignore[arg-type]


def test_a_batch_that_memory_does_not_hold_goes_through_in_parts(models: Callable[[int], IntegerModel]) -> None:
    model = models(4)
    engine = CudaEngine(model)
    size = model.preprocessing.input_size
    total = torch.cuda.get_device_properties(0).total_memory
    images = pixels_for(size, 4096).cpu()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
        with pytest.warns(SlowerWarning, match=r"does not hold the buffers of 4096 images at once: .* parts of 2048, which"):
            logits = engine.forward(images)
        assert torch.equal(engine.forward(images), logits), "without asking for the whole memory again"
        assert torch.equal(engine.forward(images[:4]), logits[:4])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(logits, torch.cat([CudaEngine(model).forward(part) for part in images.split(256)]))


@pytest.mark.parametrize("pieces", [1, 8])
def test_images_may_lie_anywhere(pieces: int, models: Callable[[int], IntegerModel]) -> None:
    model = models(4)
    engine = CudaEngine(model)
    pixels = pixels_for(model.preprocessing.input_size, 2)
    memory = torch.zeros(pixels.numel() + pieces, dtype=torch.uint8, device="cuda")
    view = memory[pieces:].view(pixels.shape).copy_(pixels)
    assert torch.equal(engine.forward(view), engine.forward(pixels))


def test_as_many_tokens_as_there_is_room_for(perturb: Callable[..., Any]) -> None:
    """And not one row of patches more."""
    most = most_tokens(64, Gpu().most_shared)
    side = int((most - 1) ** 0.5)
    for patches, runs in ((side, True), (side + 1, False)):
        options = {"embed_dim": 64, "num_heads": 1, "depth": 1, "patch_size": 2, "img_size": 2 * patches, "num_classes": 5}
        student = qvit.quantize(timm.create_model("deit_tiny_patch16_224", **options).cuda(), bits=4)
        preprocessing = student.qvit.preprocessing
        pixels = pixels_for(preprocessing.input_size, 2)
        images = torch.from_numpy(preprocessing.normalise(pixels.cpu().numpy())).cuda()
        qvit.calibrate(student, [images], images=2)
        model = qvit.freeze(perturb(student))
        if not runs:
            with pytest.raises(UnsupportedModelError, match=f"tokens on this GPU, only {most:,} with heads of 64 channels"):
                CudaEngine(model)
            continue
        assert torch.equal(CudaEngine(model).forward(pixels), ReferenceEngine(model, "cuda").forward(images))


def test_results_are_not_overwritten(models: Callable[[int], IntegerModel]) -> None:
    model = models(4)
    engine = CudaEngine(model)
    first, second = (pixels_for(model.preprocessing.input_size, 4) for _ in range(2))
    kept = engine.forward(first)
    copy = kept.clone()
    assert not torch.equal(engine.forward(second), copy)
    assert torch.equal(kept, copy)


def test_two_engines_and_streams_at_once(models: Callable[[int], IntegerModel]) -> None:
    pixels = pixels_for(models(4).preprocessing.input_size, 8)
    engines = [CudaEngine(models(bits)) for bits in (4, 2)]
    expected = [engine.forward(pixels) for engine in engines]
    streams = [torch.cuda.Stream() for _ in engines]
    torch.cuda.synchronize()
    logits: list[list[torch.Tensor]] = [[], []]
    for _ in range(5):
        for i, (engine, stream) in enumerate(zip(engines, streams, strict=True)):
            with torch.cuda.stream(stream):
                logits[i].append(engine.forward(pixels))
    torch.cuda.synchronize()
    for one, wanted in zip(logits, expected, strict=True):
        assert all(torch.equal(each, wanted) for each in one)


def test_a_thread_that_has_not_used_the_gpu_yet(models: Callable[[int], IntegerModel]) -> None:
    """It has no CUDA context: made, recorded and replayed there."""
    engine, pixels = CudaEngine(models(4)), pixels_for(models(4).preprocessing.input_size, 4)
    expected = engine.forward(pixels)
    torch.cuda.synchronize()
    for one in (engine, CudaEngine(models(4))):
        with ThreadPoolExecutor(1) as thread:
            assert torch.equal(thread.submit(one.forward, pixels).result(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(models: Callable[[int], IntegerModel]) -> None:
    """Beside an engine on the current one, which has recorded before and does again in between."""
    model, second = models(4), torch.device("cuda:1")
    pixels = pixels_for(model.preprocessing.input_size, 8)
    images = torch.from_numpy(model.preprocessing.normalise(pixels.cpu().numpy()))
    engines = CudaEngine(model, "cuda:0"), CudaEngine(model, second)
    codes: list[dict[str, torch.Tensor]] = [{}, {}]
    expected, there = (engine.forward(pixels, found) for engine, found in zip(engines, codes, strict=True))
    assert torch.equal(there.cpu(), expected.cpu())
    assert all(torch.equal(code.cpu(), codes[0][name].cpu()) for name, code in codes[1].items())
    for same in (pixels.to(second), images, pixels):
        for engine in engines:
            logits = [engine.forward(same[:count]) for count in (8, 1, 8)]
            assert all(one.device == engine.device for one in logits)
            assert all(torch.equal(one.cpu(), expected[: len(one)].cpu()) for one in logits)
    stream = torch.cuda.Stream(second)
    with torch.cuda.stream(stream):
        logits = [engines[1].forward(pixels.to(second))]
    stream.synchronize()
    assert torch.equal(logits[0].cpu(), expected.cpu())
    rows = kernel_rows(engines[1], 1, Ceilings(1000.0, 100.0, 100.0))
    assert all(row["ms"] > 0 for row in rows)
    assert torch.cuda.current_device() == 0


def test_logits_are_of_the_images_kind_and_device(models: Callable[[int], IntegerModel], tmp_path: Path) -> None:
    path = tmp_path / "model.qvit"
    models(4).save(path)
    runner = qvit.load(path, engine="cuda", device="cuda:0")
    assert qvit.load(path, device="cuda").engine.name == "cuda"
    pixels = pixels_for(runner.model.preprocessing.input_size, 2)
    there = runner(pixels)
    assert isinstance(there, torch.Tensor)
    assert there.device == pixels.device
    here = runner(pixels.cpu())
    assert isinstance(here, torch.Tensor)
    assert here.device.type == "cpu"
    array = runner(pixels.cpu().numpy())
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, here.numpy())
    assert torch.equal(here, there.cpu())
    with pytest.raises(InputError, match=r"takes images \[B, 3, 224, 224\]"):
        runner(pixels[:, :, :-1])
    with pytest.raises(InputError, match="There is no GPU 77"):
        qvit.load(path, engine="cuda", device="cuda:77")


def test_another_process_does_not_compile_again(models: Callable[[int], IntegerModel], tmp_path: Path) -> None:
    path, images = tmp_path / "model.qvit", tmp_path / "images.pt"
    models(4).save(path)
    torch.save(pixels_for(models(4).preprocessing.input_size, 2).cpu(), images)
    environment = {**os.environ, "QVIT_CACHE": str(tmp_path / "kernels"), "PYTHONPATH": str(Path(qvit.__file__).parents[1])}
    results = []
    for mode in ("compiler", "no compiler"):
        command = [sys.executable, "-c", SECOND_PROCESS, str(path), str(images), mode]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(f"{images}.logits"))
    assert torch.equal(*results)
    assert any((tmp_path / "kernels").iterdir())


def test_ceilings_and_kernels(models: Callable[[int], IntegerModel]) -> None:
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, side=2048, copied=1 << 26)
    assert ceilings.int8_tops > 1
    assert ceilings.gb_per_s > 10
    engine = CudaEngine(models(4))
    rows = kernel_rows(engine, 4, Ceilings(ceilings.gb_per_s, ceilings.bf16_tflops, ceilings.int8_tops))
    assert {row["kernel"] for row in rows} >= {"gemm_few", "attention", "pixels"}
    assert all(0 < row["ms"] < 100 for row in rows)
    assert sum(row["launches"] for row in rows) == len(engine.launches(4))
