"""Preprocessing without PyTorch against timm's evaluation transform, pixel by pixel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from qvit.errors import FileFormatError, InputError
from qvit.preprocessing import Preprocessing, open_image
from qvit.sources import open_source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth gradients with noise on top: resampling errors show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), (x * y) % 256], -1)
    noisy = np.clip(base + rng.normal(0, 30, base.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    return image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)


def by_timm(image: Image.Image, p: Preprocessing) -> np.ndarray:
    transform = create_transform(
        input_size=p.input_size,
        is_training=False,
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        crop_pct=p.crop_pct,
        crop_mode=p.crop_mode,
    )
    return transform(image.convert("L" if p.input_size[0] == 1 else "RGB")).numpy()


def check(image: Image.Image, p: Preprocessing) -> None:
    """Floats within 1e-6 and, since a step between pixels is 1/255/std, the same pixels everywhere."""
    pixels = p.pixels(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == p.input_size
    assert pixels.flags["C_CONTIGUOUS"]
    want = by_timm(image, p)
    std, mean = np.array(p.std)[:, None, None], np.array(p.mean)[:, None, None]
    assert np.array_equal(pixels, np.round((want * std + mean) * 255).astype(np.int64))
    got = p.normalise(pixels)
    assert got.dtype == np.float32
    assert got.shape == p.input_size
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


SIZES = [(224, 224), (500, 375), (375, 500), (331, 97), (97, 331), (32, 32), (31, 45), (1, 1), (1, 300), (640, 480), (257, 255)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_square_models(size: tuple[int, int], crop_pct: float, interpolation: str, crop_mode: str) -> None:
    check(picture(*size), Preprocessing((3, 64, 64), crop_pct, crop_mode, interpolation, MEAN, STD))


@pytest.mark.parametrize("input_size", [(3, 224, 224), (3, 99, 99), (3, 48, 80), (3, 80, 48), (3, 33, 47)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_other_input_sizes(input_size: tuple[int, int, int], crop_pct: float, crop_mode: str) -> None:
    for size in [(500, 375), (97, 331), (40, 40), (224, 224)]:
        check(picture(*size), Preprocessing(input_size, crop_pct, crop_mode, "bicubic", MEAN, STD))


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    crop_pct=st.sampled_from([0.7, 0.875, 0.9, 0.96, 1.0]),
    target=st.integers(8, 80),
    other=st.integers(8, 80),
)
def test_any_size(width: int, height: int, crop_pct: float, target: int, other: int) -> None:
    image = picture(width, height)
    check(image, Preprocessing((3, target, target), crop_pct))
    check(image, Preprocessing((3, target, other), crop_pct))
    check(image, Preprocessing((3, target, other), crop_pct, "squash", "bilinear"))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_modes(mode: str, channels: int) -> None:
    p = Preprocessing((channels, 40, 40), 0.875, mean=MEAN[:channels], std=STD[:channels])
    check(picture(61, 50, mode), p)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop_pct", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_filters(interpolation: str, crop_pct: float, mode: str) -> None:
    for size in ((61, 50), (20, 90), (40, 40)):
        check(picture(*size, mode), Preprocessing((3, 40, 40), crop_pct, "center", interpolation))
        check(picture(*size, mode), Preprocessing((1, 33, 41), crop_pct, "center", interpolation, MEAN[:1], STD[:1]))


@pytest.mark.parametrize("size", [(4000, 3), (3, 4000), (1, 999), (999, 2), (2048, 31)])
@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_panoramas_and_towers(size: tuple[int, int], interpolation: str) -> None:
    for crop_pct in (0.875, 1.0):
        check(picture(*size), Preprocessing((3, 32, 32), crop_pct, "center", interpolation))
        check(picture(*size), Preprocessing((3, 31, 33), crop_pct, "squash", interpolation))


def _transparent_palette(folder: Path) -> Image.Image:
    image = picture(61, 50, "P")
    image.save(folder / "palette.png", transparency=3)
    return open_image(folder / "palette.png")


def _sixteen_bits(folder: Path) -> Image.Image:
    Image.fromarray(np.arange(61 * 50, dtype=np.uint16).reshape(50, 61) * 20).save(folder / "deep.png")
    return open_image(folder / "deep.png")


def _rotated_by_exif(folder: Path) -> Image.Image:
    image, exif = picture(61, 50), Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.jpg", exif=exif)
    return open_image(folder / "rotated.jpg")


def _animation(folder: Path) -> Image.Image:
    frames = [picture(61, 50, seed=seed) for seed in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return open_image(folder / "moving.gif")


def _cmyk(folder: Path) -> Image.Image:
    picture(61, 50, "CMYK").save(folder / "print.jpg")
    return open_image(folder / "print.jpg")


@pytest.mark.parametrize("make", [_transparent_palette, _sixteen_bits, _rotated_by_exif, _animation, _cmyk])
def test_unusual_files(tmp_path: Path, make: Callable[[Path], Image.Image]) -> None:
    check(make(tmp_path), Preprocessing((3, 40, 40), 0.875))


def test_real_photographs(data_dir: Path) -> None:
    """Imagenette's own sizes and, enlarged and squeezed by Pillow, others."""
    source = open_source(data_dir / "imagenette224-val.tar", "val")
    for index in range(0, len(source), 199):
        image = source[index][0]
        check(image, Preprocessing((3, 224, 224), 0.9, "center", "bicubic", MEAN, STD))
        check(image.resize((300, 411)), Preprocessing((3, 224, 224), 0.875, "center", "bilinear", MEAN, STD))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    picture(70, 55).save(path)
    image = open_image(path)
    check(image, Preprocessing((3, 40, 40), 0.875))
    path.unlink()
    image.convert("RGB")  # decoded, not lazily tied to the file


def test_missing_files_folders_and_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    whole = tmp_path / "whole.jpg"
    picture(200, 200).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:1000])
    whole_png = tmp_path / "whole.png"
    picture(200, 200).save(whole_png)
    damaged = bytearray(whole_png.read_bytes())
    damaged[200:400] = bytes(200)
    (tmp_path / "damaged.png").write_bytes(damaged)
    for name in ("missing.jpg", "text.png", "empty.jpg", "cut.jpg", "damaged.png", ".", "text.png/below"):
        path = tmp_path / name
        with pytest.raises(InputError) as error:
            open_image(path)
        assert str(tmp_path) in str(error.value), name
        assert "\n" not in str(error.value), name
        open_image(str(whole))


def test_model_channels_that_no_file_has() -> None:
    p = Preprocessing((4, 8, 8), mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(InputError, match="4 channels"):
        p.pixels(picture(8, 8))


def test_normalise_batches() -> None:
    p = Preprocessing((3, 5, 4))
    batch = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4), dtype=np.uint8)
    assert np.array_equal(p.normalise(batch)[1], p.normalise(batch[1]))


@pytest.mark.parametrize(
    "change",
    [
        {"crop_pct": 0.0},
        {"crop_pct": 1.5},
        {"crop_mode": "border"},
        {"interpolation": "random"},
        {"std": (0.1, 0.2, 0.0)},
        {"std": (0.1, 0.2)},
        {"mean": (0.5,)},
        {"input_size": (3, 224)},
        {"input_size": (3, 0, 224)},
        {"input_size": (3, 224, -1)},
        {"mean": (float("nan"), 0.5, 0.5)},
    ],
)
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(InputError):
        Preprocessing(**({"input_size": (3, 224, 224)} | change))


def test_json_round_trip_and_damage() -> None:
    p = Preprocessing((3, 224, 200), 0.9, "squash", "bilinear", MEAN, STD)
    data = json.loads(json.dumps(p.to_dict()))
    assert Preprocessing.from_dict(data) == p
    for damage in (
        {"colour": 1},
        {"crop_pct": "much"},
        {"crop_pct": 7.0},
        {"mean": 3},
        {"mean": ["a", "b", "c"]},
        {"input_size": None},
        {"input_size": [3, "224", 224]},
        {"input_size": [3, 2.5, 224]},
        {"interpolation": 4},
        {"crop_mode": []},
    ):
        with pytest.raises((FileFormatError, InputError)):
            Preprocessing.from_dict(data | damage)
    with pytest.raises(FileFormatError):
        Preprocessing.from_dict({})


def test_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['timm'] = None; import qvit.preprocessing"
    subprocess.run([sys.executable, "-c", code], check=True)
