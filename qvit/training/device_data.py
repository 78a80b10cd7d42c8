"""Batches from images that lie on the training device (``data.cache: device``): cropped, flipped and normalised there.

A step's images are those that a loader with worker processes gives in its place, with crops drawn as timm draws them, but
with other random numbers (`qvit.training.crops`). Of several processes, each keeps all training images, since any may fall to
it in any epoch, and its own share of the validation images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from qvit.preprocessing import Preprocessing
from qvit.training.crops import draw_crops
from qvit.training.data import EpochSampler
from qvit.training.pixels import PixelStore
from qvit.training.resample import resized_crops
from qvit.training.sections import DataSection


class AsStored:
    """Decodes an image without resizing it: uint8 [C, H, W].

    Args:
        channels: 1 or 3.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, image: Image.Image) -> np.ndarray:
        array = np.asarray(image.convert("L" if self.channels == 1 else "RGB"), dtype=np.uint8)
        return np.ascontiguousarray(array[None] if self.channels == 1 else array.transpose(2, 0, 1))


class Normaliser:
    """``(pixel / 255 - mean) / std`` on a device, in the order and so with the bits of `Preprocessing.normalise`."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        # Tensors: a GPU would multiply by the reciprocal of a Python number.
        self.white = torch.tensor(255.0, device=device)
        self.mean = torch.tensor(preprocessing.mean, device=device)[:, None, None]
        self.std = torch.tensor(preprocessing.std, device=device)[:, None, None]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """[.., C, H, W], uint8 or whole float32 -> float32, contiguous."""
        return ((pixels.float() / self.white - self.mean) / self.std).contiguous()


class DeviceLoader:
    """Training batches (images [B, C, H, W] float32, class indices [B]) of one process, on the device.

    Iterating gives the rest of the epoch that the sampler stands at. Nothing is copied from the host and nothing is waited for
    but the epoch's boxes (20 bytes an image) at its beginning.

    Args:
        store: all training images.
        sampler: of the order, shared by all processes.
        data: the recipe's section.
        preprocessing: of the model.
        batch_size: images a step of this process.
        seed: of the crops.
        process, processes: this one, and how many there are.
    """

    def __init__(
        self,
        store: PixelStore,
        sampler: EpochSampler,
        data: DataSection,
        preprocessing: Preprocessing,
        batch_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.store, self.sampler, self.augment, self.seed = store, sampler, data.augment, seed
        self.batch_size, self.process, self.processes = batch_size, process, processes
        self.size = (preprocessing.input_size[1], preprocessing.input_size[2])
        self.normalise = Normaliser(preprocessing, store.pixels.device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = self.store.pixels.device
        images, repeats = self._mine()
        index, boxes, flips = (torch.from_numpy(array).to(device) for array in (images, *self._crops(images, repeats)))
        for first in range(0, len(images), self.batch_size):
            batch = slice(first, first + self.batch_size)
            pixels = self.store.pixels[index[batch]]
            crops = resized_crops(pixels, boxes[batch], flips[batch], self.size, self.augment.interpolation)
            yield self.normalise(crops), self.store.labels[index[batch]]

    def _mine(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and repeats of this process's batches of the epoch: every so many-th batch is its own."""
        images, repeats = self.sampler.positions()
        shape = (-1, self.processes, self.batch_size)
        return images.reshape(shape)[:, self.process].reshape(-1), repeats.reshape(shape)[:, self.process].reshape(-1)

    def _crops(self, images: np.ndarray, repeats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        boxes = np.empty((len(images), 4), dtype=np.int32)
        flips = np.empty(len(images), dtype=bool)
        height, width = self.store.pixels.shape[2:]
        for repeat in range(self.sampler.repeats):
            crops = draw_crops(self.seed, self.sampler.crop_epoch, repeat, len(self.store), (height, width), self.augment)
            here = repeats == repeat
            boxes[here], flips[here] = crops.boxes[images[here]], crops.flips[images[here]]
        return boxes, flips


class DeviceEvaluationLoader:
    """Validation batches (images [B, C, H, W] float32, class indices [B]) in order, on the device; the last may be smaller.

    Args:
        store: images as `Preprocessing.pixels` gives them.
        preprocessing: of the model.
        batch_size: images a batch.
    """

    def __init__(self, store: PixelStore, preprocessing: Preprocessing, batch_size: int) -> None:
        self.store, self.batch_size = store, batch_size
        self.normalise = Normaliser(preprocessing, store.pixels.device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, len(self.store), self.batch_size):
            batch = slice(first, first + self.batch_size)
            yield self.normalise(self.store.pixels[batch]), self.store.labels[batch]
