"""From an image file to the array that a model takes: timm's evaluation transform in Pillow and NumPy, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from qvit.errors import FileFormatError, InputError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input.

    Attributes:
        input_size: (channels, height, width).
        crop_pct: share of the resized image that the crop keeps, in (0, 1].
        crop_mode: ``center`` (resized in proportion to cover ``size / crop_pct``, then cropped) or ``squash`` (each side).
        interpolation: Pillow's filter by timm's name.
        mean, std: normalisation, one a channel, of pixels in [0, 1].
    """

    input_size: tuple[int, int, int]
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(math.isfinite(value) for value in (*self.input_size, *self.mean, *self.std)):
            raise InputError(f"input_size {self.input_size}, mean {self.mean} and std {self.std} must be finite numbers.")
        if len(self.input_size) != 3 or not all(type(extent) is int and extent > 0 for extent in self.input_size):
            raise InputError(f"input_size {self.input_size} must be (channels, height, width), whole numbers above 0.")
        channels = self.input_size[0]
        if len(self.mean) != channels or len(self.std) != channels or not all(s > 0 for s in self.std):
            raise InputError(
                f"mean {self.mean} and std {self.std} must have one positive std per channel of {self.input_size}."
            )
        if self.interpolation not in _FILTERS or self.crop_mode not in ("center", "squash") or not 0 < self.crop_pct <= 1:
            raise InputError(
                f"The preprocessing (crop_mode={self.crop_mode}, crop_pct={self.crop_pct}, interpolation={self.interpolation}) "
                f"is not supported: use center or squash, a crop_pct in (0, 1] and one of {', '.join(_FILTERS)}."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Reads what `to_dict` wrote; raises `FileFormatError` where that fails."""
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise FileFormatError(f"The preprocessing {dict(data)!r} is damaged: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return asdict(self)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """An image -> its resized and cropped pixels, uint8 [C, H, W]; greyscale or RGB by the model's channels."""
        channels, height, width = self.input_size
        if channels not in (1, 3):
            raise InputError(f"The model takes {channels} channels, which no image file has: pass it arrays instead of files.")
        image = image.convert("L" if channels == 1 else "RGB")
        array = np.asarray(self._resized(image, height, width), dtype=np.uint8)
        return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))

    def _resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        resample = _FILTERS[self.interpolation]
        scaled_height, scaled_width = math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)
        w, h = image.size
        if self.crop_mode == "squash":
            target = (scaled_width, scaled_height)
        elif scaled_height == scaled_width:
            # The shorter side is resized to size / crop_pct, the longer one in proportion.
            target = (scaled_width, int(scaled_width * h / w)) if w <= h else (int(scaled_height * w / h), scaled_height)
        else:
            # The smallest image of these proportions that covers the scaled rectangle.
            ratio = min(h / scaled_height, w / scaled_width)
            target = (round(w / ratio), round(h / ratio))
        if target != image.size:
            image = image.resize(target, resample)
        left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
        if (left, top) == (0, 0) and image.size == (width, height):
            return image
        # Pillow fills what lies outside with zeros, as timm's crop does with an image that is too small.
        return image.crop((left, top, left + width, top + height))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [.., C, H, W] -> float32, ``(pixel / 255 - mean) / std``."""
        mean = np.asarray(self.mean, dtype=np.float32)[:, None, None]
        std = np.asarray(self.std, dtype=np.float32)[:, None, None]
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def open_image(path: str | Path) -> Image.Image:
    """Reads and decodes an image file.

    Raises:
        InputError: the file is missing, unreadable or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: check the path.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: name image files.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}): use a JPEG or PNG file that is not damaged.") from None
