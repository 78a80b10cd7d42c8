"""Image sources: what they find, and what they say when there is nothing to find."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from qvit.errors import InputError
from qvit.sources import DigitsSource, FolderSource, TarSource, open_source
from tests.training.helpers import CLASSES, TRAIN, VAL, write_images


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train`` (40) and ``val`` (11) images of three classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", TRAIN, 0)
    write_images(root / "val", VAL, 1)
    return root


def pack(root: Path, path: Path, prefix: str = "") -> Path:
    """A tar file of the images in the class folders under ``root``."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(root.rglob("*.png")):
            tar.add(file, arcname=prefix + file.relative_to(root).as_posix())
    return path


def identity(batch: list) -> list:
    return [(np.asarray(image), label) for image, label in batch]


def test_a_folder_holds_sorted_classes(image_folder: Path) -> None:
    source = open_source(image_folder / "train", "train")
    assert isinstance(source, FolderSource)
    assert source.classes == list(CLASSES)
    assert len(source) == TRAIN
    image, label = source[len(source) - 1]
    assert image.size == (8, 8)
    assert CLASSES[label] == "red"


def test_one_folder_serves_both_splits(image_folder: Path) -> None:
    assert len(open_source(image_folder, "train")) == TRAIN
    assert len(open_source(str(image_folder), "val")) == VAL


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_names_of_the_validation_split(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / name, 5, 0)
    assert len(open_source(tmp_path, "val")) == 5


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    write_images(tmp_path, 6, 0)
    (tmp_path / "red").rename(tmp_path / "train")
    assert open_source(tmp_path, "train").classes == ["blue", "green", "train"]


def test_tar_files_are_taken_together(image_folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "more", 4, 5)
    first = pack(image_folder / "train", tmp_path / "0.tar", prefix="./set/")
    second = pack(tmp_path / "more", tmp_path / "1.tar")
    source = open_source([first, second], "train")
    assert isinstance(source, TarSource)
    assert source.classes == list(CLASSES)
    assert len(source) == TRAIN + 4
    folder = open_source(image_folder / "train", "train")
    for index in (0, 17, TRAIN - 1):
        image, label = source[index]
        expected, expected_label = folder[index]
        assert label == expected_label
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert np.asarray(source[TRAIN][0]).shape == (8, 8, 3)


def test_a_tar_file_of_both_splits(image_folder: Path, tmp_path: Path) -> None:
    path = pack(image_folder, tmp_path / "both.tar")
    assert len(open_source(path, "train")) == TRAIN
    assert len(open_source(path, "val")) == VAL


def test_a_tar_source_survives_loader_processes(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(pack(image_folder / "train", tmp_path / "a.tar"), "train")
    alone = [sample for batch in DataLoader(source, 7, collate_fn=identity) for sample in batch]
    forked = [sample for batch in DataLoader(source, 7, collate_fn=identity, num_workers=2) for sample in batch]
    assert len(forked) == TRAIN
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(alone, forked, strict=True))


def test_digits_are_split_the_same_way_always() -> None:
    train, val = DigitsSource("train"), DigitsSource("val")
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == [str(digit) for digit in range(10)]
    counts = Counter(val.labels.tolist())
    assert set(counts.values()) <= {35, 36, 37}
    image, label = train[0]
    assert (image.mode, image.size) == ("L", (8, 8))
    assert np.asarray(image).max() == 255
    assert 0 <= label < 10
    seen = {train.pixels[i].tobytes() for i in range(len(train))}
    assert sum(val.pixels[i].tobytes() in seen for i in range(len(val))) == 0


def test_imagenette_as_delivered(data_dir: Path) -> None:
    parts = [data_dir / f"imagenette224-train-{n}.tar" for n in (0, 1)]
    val = data_dir / "imagenette224-val.tar"
    if not all(path.exists() for path in [*parts, val]):
        pytest.skip("Imagenette is not in the folder of real data")
    train, test = open_source([str(p) for p in parts], "train"), open_source(val, "val")
    assert (len(train), len(test)) == (9469, 1975)
    assert train.classes == test.classes
    assert train.classes[0] == "n01440764"
    assert train[9468][0].size == (224, 224)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_damaged_tar_files_are_noticed(image_folder: Path, tmp_path: Path) -> None:
    whole = pack(image_folder / "train", tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = tar.getmembers()
    path = tmp_path / "bad.tar"
    middle = members[20].offset
    cases = {
        "between two members": whole[:middle],
        "within a member": whole[: members[20].offset_data + 10],
        "within a header": whole[: middle + 100],
        "a header in the middle is garbage": whole[:middle] + b"\xff" * 512 + whole[middle + 512 :],
        "garbage from the start": b"\x81" * 2048,
        "empty": b"",
    }
    for case, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.tar.*(damaged|truncated)") as caught:
            open_source(path, "train")
        assert "\n" not in str(caught.value), case


def test_a_compressed_tar_file_is_refused(image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(image_folder / "train", arcname="train")
    with pytest.raises(InputError, match="unpack it"):
        open_source(tmp_path / "a.tar.gz", "train")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no .*absent"):
        open_source(tmp_path / "absent", "train")
    with pytest.raises(InputError, match="no class folders"):
        open_source(tmp_path, "train")
    with pytest.raises(InputError, match="is empty"):
        open_source([], "train")
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="cat holds no images"):
        open_source(tmp_path, "train")
    with pytest.raises(InputError, match="is a folder"):
        open_source([tmp_path, tmp_path], "train")
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        info = tarfile.TarInfo("image.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match=r"flat\.tar holds no images in class folders"):
        open_source(tmp_path / "flat.tar", "train")


def test_an_image_that_is_none(tmp_path: Path) -> None:
    write_images(tmp_path / "set", 3, 0)
    bad = tmp_path / "set" / "green" / "000.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"green/000\.png"):
        open_source(tmp_path / "set", "train")[1]
    packed = open_source(pack(tmp_path / "set", tmp_path / "set.tar"), "train")
    with pytest.raises(InputError, match=r"class green in .*set\.tar"):
        packed[1]
    assert isinstance(packed[0][0], Image.Image)
