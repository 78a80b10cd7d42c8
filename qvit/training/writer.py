"""Checkpoints are written to disk while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs what it is given on a thread of its own, in order.

    What is given must not read anything that training changes. It is there when `wait` returns, and whoever ends the process
    without it waits, too; a process that is killed loses what was not written yet, and finds the file that was there before.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: list[Future[None]] = []

    def submit(self, write: Callable[[], None]) -> None:
        """Has ``write`` called soon."""
        self._pending.append(self._thread.submit(write))

    def wait(self) -> None:
        """Returns when all is written; raises what the first that failed has raised."""
        pending, self._pending = self._pending, []
        errors = [future.exception() for future in pending]
        for error in errors:
            if error is not None:
                raise error
