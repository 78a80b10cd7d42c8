"""Rows of accuracy, size and latency for `qvit report`: the model's own, and those of result files."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qvit.analyze.cost import model_cost
from qvit.analyze.report.result_figures import accuracy_of
from qvit.architecture import VitArchitecture
from qvit.bench.worker import time_calls
from qvit.cli.images import name_of
from qvit.cli.report_inputs import Opened
from qvit.engines import create_engine
from qvit.integer.freeze import freeze
from qvit.integer.model import IntegerModel
from qvit.report_file import hardware, usable_cores
from qvit.training.provenance import provenance_of

_SECONDS, _CALLS = 2.0, 20


def own_rows(opened: Opened, latency: bool, threads: int | None) -> list[dict[str, Any]]:
    """The model's own row, and that of the float model it came from where its accuracy is known.

    Args:
        opened: the model. A checkpoint is frozen as `qvit.freeze` does, to count its bytes; it is not changed.
        latency: time the CPU engine on one image, on this machine.
        threads: of the CPU engine; by default one a core.

    Raises:
        QvitError: the CPU engine is asked for and cannot run the model.
    """
    facts = opened.facts
    frozen, size = _frozen(opened)
    row: dict[str, Any] = {
        "model": frozen.name,
        "data": _data_name(facts.get("data")),
        "method": facts.get("method"),
        "weight_bits": opened.weight_bits,
        "act_bits": opened.act_bits,
        **{key: facts[key] for key in ("integer_top1", "fake_top1", "float_top1", "images") if facts.get(key) is not None},
        "file_bytes": size,
        "own": True,
        "source": "this run",
    }
    if latency:
        row |= _timed(frozen, threads)
    rows = [row] if accuracy_of(row) or latency else []
    parameters = _float_parameters(opened)
    if row.get("float_top1") is not None and parameters is not None:
        same = {key: row[key] for key in ("model", "data", "float_top1", "own")}
        bits = {"method": "float", "weight_bits": 32, "act_bits": 32, "file_bytes": 4 * parameters}
        rows.append({**same, **bits, "source": "the float model's checkpoint"})
    return rows


def rows_of(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result file that hold an accuracy or a latency, with the file's name and its machine."""
    machine = report.get("hardware") or {}
    where = machine.get("gpu") or machine.get("cpu")
    rows = [row for row in report["rows"] if accuracy_of(row) or row.get("ms_median") is not None]
    return [{**row, "own": False, "source": path.name, "machine": where} for row in rows]


def _float_parameters(opened: Opened) -> int | None:
    """Parameters of the float model, without those of IRM and of the quantizers; ``None`` where they cannot be counted."""
    if not isinstance(opened.model, IntegerModel):
        added = ("_quantizer.", ".rectify_q.", ".rectify_k.")
        return sum(p.numel() for name, p in opened.model.named_parameters() if not any(part in name for part in added))
    if isinstance(opened.architecture, VitArchitecture):
        return model_cost(opened.architecture, opened.model.specs).parameters
    return None


def _data_name(data: Any) -> str | None:
    if not data:
        return None
    return name_of([data] if isinstance(data, str) else list(data))


def _frozen(opened: Opened) -> tuple[IntegerModel, int]:
    """The integer model and the bytes of its file."""
    if isinstance(opened.model, IntegerModel):
        assert opened.file_bytes is not None
        return opened.model, opened.file_bytes
    assert opened.metadata is not None
    model = freeze(copy.deepcopy(opened.model).cpu(), opened.classes, provenance_of(opened.metadata))
    with tempfile.TemporaryDirectory() as folder:
        return model, model.save(Path(folder) / "model.qvit")


def _timed(model: IntegerModel, threads: int | None) -> dict[str, Any]:
    """Latency of the CPU engine on one random image; time does not depend on the values."""
    engine = create_engine(model, "cpu", threads=threads)
    image = np.random.default_rng(0).integers(0, 256, (1, *model.preprocessing.input_size), dtype=np.uint8)
    times = time_calls(lambda: engine.run(image), _SECONDS, _CALLS)
    machine = hardware()
    return {
        "engine": "cpu",
        "batch": 1,
        "threads": threads or usable_cores(),
        "ms_median": float(np.median(times)),
        "ms_p10": float(np.percentile(times, 10)),
        "ms_p90": float(np.percentile(times, 90)),
        "machine": machine["cpu"],
    }
