"""The base install: without the packages of the extras files load, `inspect` works and errors are sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qvit
from qvit.batches import PixelBatches
from qvit.preprocessing import Preprocessing
from qvit.sources import open_source

_BLOCKED = ("torch", "torchvision", "timm", "accelerate", "pydantic", "yaml", "sklearn", "scipy", "tensorboard", "matplotlib")
_ROOT = Path(__file__).parents[1]
_PIXELS = Preprocessing((1, 8, 8), mean=(0.5,), std=(0.5,))


def _run(code: str, *arguments: object, blocked: tuple[str, ...] = _BLOCKED) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process in which the packages of the extras cannot be imported."""
    block = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, timeout=60)


def _cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    # Newer versions of typer bring pydantic themselves.
    blocked = tuple(name for name in _BLOCKED if name != "pydantic")
    return _run("from qvit.cli.main import run; run()", *arguments, blocked=blocked)


def test_import_and_public_names() -> None:
    done = _run("import qvit; print(qvit.__version__, sorted(dir(qvit))[0], qvit.ModelSpec.of_bits(4).act_bits)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["0.1.0", "IntegerModel", "4"]


def test_a_file_runs(frozen_file: Path) -> None:
    done = _run(
        "import numpy as np, qvit\n"
        "runner = qvit.load(sys.argv[1])\n"
        "images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)\n"
        "print(runner.engine.name, *runner(images).argmax(1))\n"
        "for options in ({'engine': 'reference'}, {'engine': 'cuda'}, {'device': 'cuda'}):\n"
        "    try: qvit.load(sys.argv[1], **options)\n"
        "    except qvit.QvitError as error: print(type(error).__name__, error)",
        frozen_file,
    )
    assert (done.returncode, done.stderr) == (0, "")
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    expected = qvit.load(frozen_file, engine="reference")(images).argmax(1)  # type: ignore[union-attr]
    assert done.stdout.splitlines() == [
        "cpu " + " ".join(map(str, expected)),
        "MissingDependencyError The reference engine needs PyTorch: pip install 'qvit[train]'.",
        "MissingDependencyError The CUDA engine needs PyTorch: pip install 'qvit[train]'.",
        "MissingDependencyError The reference engine needs PyTorch: pip install 'qvit[train]'.",
    ]


@pytest.mark.parametrize("name", ["quantize", "calibrate", "freeze", "train"])
def test_what_needs_an_extra_says_so(name: str) -> None:
    done = _run(f"import qvit\ntry: qvit.{name}\nexcept qvit.QvitError as error: print(type(error).__name__, error)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"MissingDependencyError qvit.{name} needs ")
    assert done.stdout.endswith(": pip install 'qvit[train]'.\n")


def test_help_of_every_command() -> None:
    done = _cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    names = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.startswith("  ")]
    assert {"train", "eval", "quantize", "freeze", "predict", "inspect"} <= set(names)
    for name in names:
        done = _cli(name, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"qvit {name}" in done.stdout.partition("Example")[2], f"{name} has no example"
        assert "--json" in done.stdout


def test_inspect(frozen_file: Path) -> None:
    done = _cli("inspect", frozen_file)
    assert (done.returncode, done.stderr) == (0, "")
    assert "blocks.1.mlp.fc2" in done.stdout


def _images(folder: Path) -> Path:
    """A folder of ten classes with two greyscale images each."""
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / str(label) / f"{number}.png")
    return folder


def test_predict_and_eval(frozen_file: Path, tmp_path: Path) -> None:
    folder = _images(tmp_path / "images")
    report = tmp_path / "report.json"
    done = _cli("predict", frozen_file, folder / "3" / "0.png", "--top", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu engine" in done.stdout
    done = _cli("eval", frozen_file, "--data", folder, "--batch", 7, "--json", report)
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["engine"], row["images"]) == ("cpu", 20)
    pixels, labels = zip(*(batch for batch in PixelBatches(open_source(folder, "val"), _PIXELS, 20)), strict=True)
    expected = qvit.load(frozen_file, engine="reference")(pixels[0]).argmax(1)  # type: ignore[union-attr]
    assert row["integer_top1"] == 100 * (expected == labels[0]).mean()


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "FILE", "IMAGE", "--engine", "reference"),
        ("predict", "FILE", "IMAGE", "--engine", "cuda"),
        ("predict", "FILE", "IMAGE", "--device", "cuda"),
        ("eval", "FILE", "--data", "IMAGES", "--engine", "reference"),
        ("eval", "checkpoint.safetensors", "--data", "IMAGES"),
        ("bench", "deit_tiny_patch16_224"),
        ("report", "FILE", "-o", "report.html"),
        ("inspect", "deit_tiny_patch16_224"),
        ("quantize", "deit_tiny_patch16_224", "--budget-mb", "2", "--data", "IMAGES", "-o", "m.qvit"),
    ],
)
def test_commands_that_need_pytorch_say_so(frozen_file: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    folder = _images(tmp_path / "images")
    names = {"FILE": str(frozen_file), "IMAGES": str(folder), "IMAGE": str(folder / "0" / "0.png")}
    done = _cli(*(names.get(part, part) for part in command))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(": pip install 'qvit[train]'.\n")
    assert len(done.stderr.splitlines()) == 1


def test_importing_qvit_imports_nothing_heavy() -> None:
    code = "import sys, qvit, qvit.cli.main; qvit.cli.main.build(); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "timm", "accelerate", "pydantic", "sklearn"} & set(done.stdout.split())


def test_unknown_names_are_attribute_errors() -> None:
    import qvit

    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qvit.quantise
