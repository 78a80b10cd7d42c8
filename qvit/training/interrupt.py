"""Ctrl-C in training: the step at hand is finished and saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after it saved a checkpoint; the message says how to go on."""


class InterruptGuard:
    """While it is entered, Ctrl-C only sets `requested`; in a run of one process, a second one stops at once.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Args:
        processes: of the run. A launcher passes Ctrl-C on to processes that have it already, so with several of them a second
            one means nothing.
    """

    def __init__(self, processes: int = 1) -> None:
        self.requested = False
        self._single = processes == 1
        self._before: Any = None

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self.requested and self._single:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
