"""Decoded images on a device: the right pixels in the right order, and refusals before anything is filled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qvit.errors import InputError, RecipeError
from qvit.preprocessing import Preprocessing
from qvit.sources import open_source
from qvit.training import pixels
from qvit.training.device_data import AsStored
from qvit.training.pixels import check_memory, free_memory, load_pixels

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_and_labels_in_order(image_folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_BATCH", 7)
    source = open_source(image_folder, "train")
    store = load_pixels(source, AsStored(3), CPU, workers)
    assert len(store) == len(source) == len(store.pixels)
    for index, (stored, label) in enumerate(zip(store.pixels, store.labels, strict=True)):
        image, expected = source[index]
        assert np.array_equal(stored.numpy(), np.asarray(image).transpose(2, 0, 1))
        assert label == expected


def test_a_share_as_the_deployed_model_sees_it(image_folder: Path) -> None:
    source = open_source(image_folder, "val")
    preprocessing = Preprocessing((1, 6, 5), crop_pct=0.9, mean=(0.5,), std=(0.5,))
    store = load_pixels(source, preprocessing.pixels, CPU, indices=range(1, len(source), 3))
    assert store.pixels.shape == (4, 1, 6, 5)
    for position, index in enumerate(range(1, len(source), 3)):
        assert np.array_equal(store.pixels[position].numpy(), preprocessing.pixels(source[index][0]))
    assert len(load_pixels(source, preprocessing.pixels, CPU, indices=[])) == 0


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for number, size in enumerate([(8, 8), (8, 8), (9, 7)]):
        Image.new("RGB", size).save(folder / f"{number}.png")
    source = open_source(tmp_path, "train")
    with pytest.raises(RecipeError, match=r"differ in size \(8 x 8 and 9 x 7\).*data\.cache_size") as caught:
        load_pixels(source, AsStored(3), CPU)
    assert "\n" not in str(caught.value)


def test_an_unreadable_image_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^\S*b\.png cannot be read as an image"):
        load_pixels(open_source(tmp_path, "train"), AsStored(3), CPU, workers=1)


def test_memory_is_asked_for_first(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(CPU) > 1e6
    check_memory(49, 100, "training")
    with pytest.raises(RecipeError, match=r"training images take 3\.0 GB and 4\.0 GB of memory are free") as caught:
        check_memory(3 * 10**9, 4 * 10**9, "training")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(pixels, "free_memory", lambda _device: 2 * 40 * 3 * 8 * 8 - 1)
    monkeypatch.setattr(torch, "empty", lambda *_args, **_options: pytest.fail("memory was taken"))
    with pytest.raises(RecipeError, match="memory are free"):
        load_pixels(open_source(image_folder, "train"), AsStored(3), CPU)
