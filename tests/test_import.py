"""The base install: without the packages of the extras files load, `inspect` works and errors are sentences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_BLOCKED = ("torch", "torchvision", "timm", "accelerate", "pydantic", "yaml", "sklearn", "tensorboard")
_ROOT = Path(__file__).parents[1]


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


def test_a_file_loads_and_an_engine_says_what_it_needs(frozen_file: Path) -> None:
    done = _run(
        "import qvit\n"
        "model = qvit.IntegerModel.load(sys.argv[1])\n"
        "print(model.name, len(model.classes), model.blocks[0].fc1.weight.codes().shape)\n"
        "try: qvit.load(sys.argv[1])\n"
        "except qvit.QvitError as error: print(type(error).__name__, error)",
        frozen_file,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "vit_tiny_patch16_224 10 (48, 12)",
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


@pytest.mark.parametrize("command", [("predict", "FILE", "IMAGE"), ("eval", "FILE", "--data", "digits")])
def test_commands_that_run_the_integers_name_what_is_missing(
    frozen_file: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    from PIL import Image

    image = tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)
    done = _cli(*(str(frozen_file) if part == "FILE" else str(image) if part == "IMAGE" else part for part in command))
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
