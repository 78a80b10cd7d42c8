"""Where images come from: folders, tar files and scikit-learn's digits, behind one small interface.

A source is indexed once and reads an image when it is asked for, with no open file kept, so it is safe in forked and
spawned loader processes.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from qvit.errors import InputError, MissingDependencyError
from qvit.preprocessing import open_image

Split = Literal["train", "val"]

DIGITS = "digits"
_SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "test")}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
_BLOCK = 512  # bytes a tar file is made of


class ImageSource(Protocol):
    """Images with their classes.

    Attributes:
        classes: names, in the order of the class indices.
    """

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image as it was stored, and the index of its class.

        Raises:
            InputError: the image cannot be read.
        """
        ...


class FolderSource:
    """A folder with a folder of images for each class: ``root/<class>/../<name>.jpg``.

    Raises:
        InputError: it has no class folders, or one without images.
    """

    def __init__(self, root: Path) -> None:
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not self.classes:
            raise InputError(f"{root} has no class folders: put the images of each class into a folder of its own.")
        self.paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = sorted(str(path) for path in (root / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
            if not found:
                raise InputError(f"The class folder {root / name} holds no images: fill it or remove it.")
            self.paths += found
            labels += [label] * len(found)
        self.labels = np.asarray(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.paths[index]), int(self.labels[index])


class TarSource:
    """Uncompressed tar files of class folders, ``../<class>/<name>.jpg``, taken together.

    Where a file holds a folder of the split's name above the class folders (``train/<class>/..``), only that one counts.

    Raises:
        InputError: a file is compressed, truncated or damaged, or they hold no images in class folders.
    """

    def __init__(self, paths: Sequence[Path], split: Split) -> None:
        self.paths = list(paths)
        found: list[tuple[int, int, int, str]] = []  # file, offset, size, class
        for number, path in enumerate(self.paths):
            members = _members(path)
            of_split = [m for m in members if len(m[0]) > 2 and m[0][-3] in _SPLIT_FOLDERS[split]]
            found += [(number, offset, size, parts[-2]) for parts, offset, size in of_split or members]
        if not found:
            names = " and ".join(map(str, self.paths))
            raise InputError(f"{names} holds no images in class folders: its members must be called <class>/<name>.jpg.")
        self.classes = sorted({name for *_, name in found})
        index = {name: label for label, name in enumerate(self.classes)}
        self.locations = np.asarray([entry[:3] for entry in found], dtype=np.int64)
        self.labels = np.asarray([index[name] for *_, name in found])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number, offset, size = self.locations[index].tolist()
        path = self.paths[number]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                image = Image.open(io.BytesIO(file.read(size)))
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            label = self.classes[self.labels[index]]
            raise InputError(f"An image of class {label} in {path} (at byte {offset}) cannot be read: {error}.") from None
        return image, int(self.labels[index])


def _members(path: Path) -> list[tuple[list[str], int, int]]:
    """(parts of the name, offset, size) of the images of a tar file that lie in a folder."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [(m.name.split("/"), m.offset_data, m.size) for m in tar if m.isreg()]
            end = tar.offset
        # tarfile takes a damaged header, and a cut between two members, for the end of the archive, which is a block of zeros.
        with open(path, "rb") as file:
            file.seek(end)
            complete = file.read(_BLOCK) == bytes(_BLOCK)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"{path} is no uncompressed tar file, or is damaged ({error}): unpack it, or fetch it again."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    if not complete:
        raise InputError(f"{path} is truncated or damaged: fetch it again.")
    return [m for m in members if len(m[0]) > 1 and Path(m[0][-1]).suffix.lower() in _SUFFIXES and not m[0][-1].startswith(".")]


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, greyscale: 1,437 for training and 360 for validation.

    The split is stratified and always the same.
    """

    def __init__(self, split: Split) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise MissingDependencyError("The digits come with scikit-learn: pip install scikit-learn.") from None
        digits = load_digits()
        # Pixels are counts from 0 to 16.
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        parts = train_test_split(pixels, digits.target, test_size=360, stratify=digits.target, random_state=0)
        self.pixels, self.labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


def open_source(location: str | Path | Sequence[str | Path], split: Split) -> ImageSource:
    """Opens the images of one split.

    Args:
        location: ``digits``; a folder of class folders; a tar file of such, or a list of tar files. A folder or tar file may
            hold the splits as ``train`` and ``val`` (or ``validation``, ``test``).
        split: which of the two.

    Raises:
        InputError: there is nothing there, or no images in class folders, or a file is damaged.
    """
    if location == DIGITS:
        return DigitsSource(split)
    paths = [Path(location)] if isinstance(location, (str, Path)) else [Path(path) for path in location]
    if not paths:
        raise InputError(f"The list of {split} data is empty: name a folder or tar files.")
    for path in paths:
        if not path.exists():
            raise InputError(f"There is no {path}: check the path of the {split} data.")
    if len(paths) == 1 and paths[0].is_dir():
        return FolderSource(_split_folder(paths[0], split))
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder: several sources must all be tar files.")
    return TarSource(paths, split)


def _split_folder(root: Path, split: Split) -> Path:
    for name in _SPLIT_FOLDERS[split]:
        folder = root / name
        # A class may be called "train" too; a split has folders in it.
        if folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder)):
            return folder
    return root
