"""The result file: every command with ``--json``, every benchmark and every training run writes one.

    {"schema": 1, "command": [...], "versions": {...}, "hardware": {...}, "rows": [{...}, ...]}

A row is one flat object. Accuracies are percentages; ``docs`` quote nothing that is not in such a file.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import qvit
from qvit.errors import InputError
from qvit.files import write_atomically

SCHEMA = 1
_PACKAGES = (
    *("numpy", "safetensors", "pillow", "torch", "torchvision", "timm", "accelerate", "scikit-learn"),
    *("openvino", "nncf", "onnxruntime", "onnx", "torchao"),
)


def write_report(path: str | Path, rows: Sequence[Mapping[str, Any]], command: Sequence[str]) -> None:
    """Writes a result file atomically; the arguments are those of `report_of`.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(path, (json.dumps(report_of(rows, command), indent=2, allow_nan=False) + "\n").encode())


def report_of(rows: Sequence[Mapping[str, Any]], command: Sequence[str]) -> dict[str, Any]:
    """What a result file holds.

    Args:
        rows: flat objects of numbers, strings, booleans and ``None``. A number that is not finite becomes ``None``, since JSON
            has none.
        command: the command line that made the rows.
    """
    return {
        "schema": SCHEMA,
        "command": list(command),
        "versions": versions(),
        "hardware": hardware(),
        "rows": [{key: _finite(value) for key, value in row.items()} for row in rows],
    }


def read_report(path: str | Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        InputError: there is no such file, or it is none.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The result file {path} cannot be read ({error.strerror}): check the path.") from None
    except ValueError:
        report = None
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is no result file: name a file that a command of qvit wrote with --json.")
    if report.get("schema") != SCHEMA:
        raise InputError(
            f"{path} is a result file of schema {report.get('schema')!r} and this qvit reads {SCHEMA}: update qvit."
        )
    return report


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of Python, qvit and the libraries that are installed; imports none of them."""
    found = {"python": platform.python_version(), "qvit": qvit.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """CPU model, usable cores and, if PyTorch is in use and has one, the GPU; nothing that names the machine."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": usable_cores()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    return found


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    """The processor's name, with its family and model where the name alone does not say which generation it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name") or fields.get("Hardware") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(fields):
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name
