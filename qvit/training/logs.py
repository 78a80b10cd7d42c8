"""What a run leaves behind to look at: metrics.jsonl, TensorBoard events and a progress bar."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qvit.errors import TrainingError
from qvit.files import write_atomically

METRICS = "metrics.jsonl"


class RunLog:
    """The log of a run, written by its main process; a context manager.

    A line of ``metrics.jsonl`` is a flat JSON object with ``kind`` (``train``, ``epoch``, ``eval``, or ``eval_activations``
    while weights are floating point), ``step`` (steps done) and ``epoch`` (epochs done). The same numbers go to TensorBoard,
    if it is installed.

    Args:
        output: folder of the run.
        step: steps done before; lines of later ones, from a run that was killed, are removed.
        total_steps: of the whole run, for the progress bar.
        enabled: false in every process but the main one: then nothing is written or shown.
        progress: print a line an epoch and, where there is a terminal, a progress bar.
    """

    def __init__(self, output: Path, step: int, total_steps: int, enabled: bool = True, progress: bool = True) -> None:
        self._stack = ExitStack()
        self._path: Path | None = None
        self._board: Any = None
        self._console: Console | None = None
        self._bar: Progress | None = None
        if not enabled:
            return
        self._path = output / METRICS
        truncate_metrics(self._path, step)
        self._board = _tensorboard(output, step)
        if self._board is not None:
            self._stack.callback(self._board.close)
        if not progress:
            return
        self._console = Console(stderr=True)
        if self._console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self._bar = self._stack.enter_context(Progress(*columns, console=self._console, transient=True))
            self._task = self._bar.add_task("training", total=total_steps, completed=step)

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Adds one line; it reaches the file at once."""
        if self._path is None:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        except OSError as error:
            raise TrainingError(f"The log {self._path} cannot be written ({error.strerror}): free space and resume.") from None
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def print(self, text: str) -> None:
        """Shows a line to whoever watches."""
        if self._console is not None:
            self._console.print(text, highlight=False)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; without those that were cut off, and empty where there is no log."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            values["kind"], values["step"], values["epoch"]
        except (ValueError, KeyError, TypeError):
            continue
        kept.append(values)
    return kept


def truncate_metrics(path: Path, step: int) -> None:
    """Removes the lines of steps after ``step``, and a last line that was cut off."""
    if path.exists():
        kept = [json.dumps(values) + "\n" for values in read_metrics(path) if values["step"] <= step]
        write_atomically(path, "".join(kept).encode())


def _tensorboard(output: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(output), purge_step=step + 1 if step else None)
