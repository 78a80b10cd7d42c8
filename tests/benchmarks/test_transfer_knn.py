"""Nearest neighbours are scikit-learn's; the features are those of the model."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transfer_knn
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import qvit
from qvit.errors import InputError
from qvit.preprocessing import Preprocessing


def test_votes_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 1300)
    features = rng.normal(size=(1300, 12)) + 2 * np.eye(12)[labels]
    split = 230
    got = transfer_knn.knn_top1(
        *(torch.from_numpy(array) for array in (features[split:], labels[split:], features[:split], labels[:split])), 5
    )
    for index, weights in enumerate((lambda distance: np.exp((1 - distance) / transfer_knn.TEMPERATURE), "uniform")):
        model = KNeighborsClassifier(transfer_knn.NEIGHBOURS, metric="cosine", weights=weights)
        model.fit(features[split:], labels[split:])
        expected = 100 * model.score(features[:split], labels[:split])
        # Where two classes have as many votes, ours takes the nearer and scikit-learn the first.
        assert got[index] == pytest.approx(expected, abs=0.01 if index == 0 else 3)
    assert 50 < got[0] < 100


def test_fewer_images_than_neighbours() -> None:
    features, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert transfer_knn.knn_top1(features, labels, features + 0.01, labels, 3) == (100, 100)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A CIFAR-10 of two classes that any features tell apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, name in enumerate(("bright", "dark")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(120 * (1 - label), 120 * (1 - label) + 100, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    with tarfile.open(tmp_path / "cifar10.tar", "w") as tar:
        tar.add(tmp_path / "images", "")
    return tmp_path


def test_float_and_integers(
    data: Path, small_vit: Callable[..., nn.Module], make_student: Callable[..., nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "num_heads": 3, "depth": 1, "num_classes": 5}
    teacher = small_vit("vit_tiny_patch16_224", **options)
    safetensors.torch.save_file(teacher.state_dict(), data / "teacher.safetensors")
    qvit.freeze(make_student(teacher, weight_bits=8, act_bits=8)).save(data / "w8a8.qvit")
    change = f"model={{name: vit_tiny_patch16_224, args: {json.dumps(options)}}}"
    arguments = ["--data-dir", str(data), "--model", str(data / "w8a8.qvit"), "--teacher", str(data / "teacher.safetensors")]
    arguments += ["--set", change, f"model.checkpoint={data / 'teacher.safetensors'}", "--workers", "0", "--batch", "7"]
    arguments += ["--train-images", "40", "--device", "cpu", "--json", str(data / "result.json")]
    rows = transfer_knn.main(arguments)
    assert [(row["method"], row["weight_bits"], row["train_images"], row["images"]) for row in rows] == [
        ("float", 32, 40, 16),
        ("integers", 8, 40, 16),
    ]
    assert rows[0]["knn_top1"] == 100
    assert rows[1]["difference"] == rows[1]["knn_top1"] - rows[0]["knn_top1"]
    report = json.loads((data / "result.json").read_text())
    assert report["rows"] == rows
    assert str(data) not in json.dumps(report)
    assert "w8a8.qvit" in capsys.readouterr().out


def test_features_are_of_the_resized_images(data: Path) -> None:
    images = transfer_knn.Images(data / "cifar10.tar", (None, 4), torch.device("cpu"), 0)
    assert (len(images.sets["train"]), len(images.sets["val"]), images.classes) == (48, 4, 2)
    assert images.sets["val"].labels.tolist() == [0, 0, 1, 1]
    preprocessing = Preprocessing((3, 20, 20), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    got = images.features("val", lambda x: x.flatten(1), preprocessing, batch=3)
    for pixels, feature in zip(images.sets["val"].pixels, got, strict=True):
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        expected = preprocessing.normalise(preprocessing.pixels(picture))
        assert np.abs(feature.numpy().reshape(expected.shape) - expected).max() < 2 / 255 / 0.4


def test_a_file_that_is_missing(data: Path) -> None:
    with pytest.raises(InputError, match="There is no"):
        transfer_knn.main(["--data-dir", str(data), "--model", str(data / "none.qvit")])
