"""`qvit.load`: a file becomes something that classifies images, and bad input is refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.engines import Runner, create_engine, default_engine
from qvit.errors import FileFormatError, InputError, MissingDependencyError, SlowerWarning, UnsupportedModelError
from qvit.integer.model import IntegerModel


@pytest.fixture
def runner(frozen_file: Path) -> Any:
    return qvit.load(frozen_file)


def _pixels(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


def test_arrays_in_arrays_out_tensors_in_tensors_out(runner: Any) -> None:
    pixels = _pixels()
    floats = runner.model.preprocessing.normalise(pixels)
    logits = runner(pixels)
    assert isinstance(logits, np.ndarray)
    assert (logits.dtype, logits.shape) == (np.float32, (3, 10))
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    # Pixels, normalised floats of two widths and tensors are one and the same input.
    assert (runner(floats) == logits).all()
    assert (runner(floats.astype(np.float64)) == logits).all()
    from_tensor = runner(torch.from_numpy(floats))
    assert isinstance(from_tensor, torch.Tensor)
    assert (from_tensor.numpy() == logits).all()
    assert (runner(torch.from_numpy(pixels)).numpy() == logits).all()


def test_batches_do_not_matter(runner: Any) -> None:
    pixels = _pixels(5)
    apart = np.concatenate([runner(pixels[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(apart, runner(pixels), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_no_logits(runner: Any) -> None:
    assert runner(_pixels(0)).shape == (0, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.uint8), r"takes images \[B, 1, 8, 8\], not \[1, 3, 8, 8\]"),
        (np.zeros((1, 1, 9, 8), np.uint8), "not"),
        (np.zeros((1, 8, 8), np.uint8), r"not \[1, 8, 8\]"),
        (np.zeros((1, 1, 8, 8), np.int32), "uint8 pixels or normalised floats, not int32"),
        (np.full((1, 1, 8, 8), np.nan, np.float32), "not finite"),
        (np.full((1, 1, 8, 8), np.inf, np.float32), "not finite"),
    ],
)
def test_other_images_are_refused(runner: Any, images: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner(images)


def test_other_engines_and_files_are_refused(frozen_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no engine 'warp': use one of cpu, cuda, reference"):
        qvit.load(frozen_file, engine="warp")
    with pytest.raises(InputError, match="No such file"):
        qvit.load(tmp_path / "none.qvit")
    frozen_file.write_bytes(frozen_file.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="truncated or damaged"):
        qvit.load(frozen_file)


def test_a_loaded_model_computes_what_the_frozen_one_does(frozen: IntegerModel, runner: Any) -> None:
    images = frozen.preprocessing.normalise(_pixels())
    assert (create_engine(frozen).run(images) == runner(images)).all()


class Device:
    """An engine on a device of PyTorch's: takes what it is given, and answers with the sum of each image."""

    takes_pixels = takes_tensors = True

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return images.to(self.device).flatten(1).sum(1, keepdim=True, dtype=torch.float32)

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.forward(torch.from_numpy(images)).numpy()


def test_an_engine_that_takes_tensors_gets_them_as_they_are(frozen: IntegerModel) -> None:
    engine = Device()
    runner = Runner(frozen, engine)
    pixels = torch.from_numpy(_pixels())
    for images in (pixels, pixels.double(), pixels.bfloat16(), pixels.half()):
        logits = runner(images)
        assert isinstance(logits, torch.Tensor)
        assert engine.seen[-1] is images
        torch.testing.assert_close(logits[:, 0], images.flatten(1).sum(1, dtype=torch.float32))
    arrays = runner(pixels.numpy())
    assert isinstance(arrays, np.ndarray)
    assert (arrays == runner(pixels).numpy()).all()  # type: ignore[union-attr]
    for bad in (pixels.int(), pixels[0], pixels.bool(), pixels[:, :, 1:]):
        with pytest.raises(InputError, match=r"takes images \[B, 1, 8, 8\]|normalised floats, not (int32|bool)"):
            runner(bad)
    assert len(engine.seen) == 6


def test_logits_come_back_to_where_the_images_are(frozen: IntegerModel) -> None:
    # "meta" stands for a GPU: nothing can be read there, so a hidden copy to the CPU would fail.
    pixels = torch.from_numpy(_pixels())
    assert Runner(frozen, Device("meta"))(pixels.to("meta")).device.type == "meta"  # type: ignore[union-attr]
    assert Runner(frozen, Device("cpu"))(pixels).device.type == "cpu"  # type: ignore[union-attr]


def test_the_engine_of_a_device() -> None:
    assert [default_engine(device) for device in (None, "cpu", "cuda", "cuda:1", "mps", "xpu:0")] == [
        *("cpu", "cpu", "cuda", "cuda", "reference", "reference")
    ]


@pytest.mark.parametrize(("device", "instead"), [("cpu", "cpu"), ("mps", "reference"), ("cuda:x", "reference")])
def test_the_cuda_engine_runs_on_nvidia_gpus_alone(frozen_file: Path, device: str, instead: str) -> None:
    with pytest.raises(InputError) as caught:
        qvit.load(frozen_file, engine="cuda", device=device)
    assert str(caught.value) == (
        f"The engine 'cuda' does not run on the device '{device}': use device='cuda' (or 'cuda:1'), or engine='{instead}'."
    )


def test_the_cuda_engine_is_made_on_the_device(frozen: IntegerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[IntegerModel, str]] = []
    monkeypatch.setattr("qvit.engines.cuda.CudaEngine", lambda *arguments: made.append(arguments) or "engine")
    assert create_engine(frozen, "cuda") == "engine"
    assert create_engine(frozen, "cuda", "cuda:1") == "engine"
    assert made == [(frozen, "cuda"), (frozen, "cuda:1")]


@pytest.mark.parametrize("kind", [UnsupportedModelError, MissingDependencyError])
def test_the_reference_engine_stands_in_where_none_was_named(
    kind: type[Exception], frozen: IntegerModel, frozen_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise kind("No heads of 4: use engine='reference'.")

    monkeypatch.setattr("qvit.engines.cpu.CpuEngine", fail)
    monkeypatch.setattr("qvit.engines.reference.ReferenceEngine", lambda model, device: device)
    with pytest.warns(SlowerWarning, match=r"^The reference engine stands in, which is much slower: no heads of 4\.$"):
        assert create_engine(frozen) == "cpu"
    with pytest.warns(SlowerWarning, match="stands in") as caught:
        qvit.load(frozen_file)
    assert {Path(one.filename).name for one in caught} == {"test_load.py"}
    said: list[str] = []
    assert create_engine(frozen, note=said.append) == "cpu"
    assert len(said) == 1
    with pytest.raises(kind, match="No heads of 4: use engine="):
        create_engine(frozen, "cpu")
