"""The parent's side of a process that is prepared or measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_SECONDS_TO_END = 5.0


class ChildError(Exception):
    """A child process failed; the message says why in one sentence."""


class Child:
    """A Python process that answers lines of JSON with lines of JSON. Use it as a context manager: it ends with the block.

    Args:
        module: that it runs.
        request: its argument.
        environment: variables to set, beside the ones of this process.

    Attributes:
        start_seconds: from before the process existed to its first reply.
    """

    def __init__(self, module: str, request: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        command = [sys.executable, "-m", module, json.dumps(request)]
        # The child must find this very package, wherever it is run from.
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        before = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})},
            text=True,
        )
        try:
            self._reply()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - before

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Sends an order and waits for its reply; raises `ChildError` where there is none."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildError(self._last_words())
        reply = json.loads(line)
        if "error" in reply:
            raise ChildError(reply["error"])
        return reply

    def _last_words(self) -> str:
        """Why a process that said nothing has ended."""
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        reason = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"its process ended with {reason}" + (f" ({lines[-1].strip()})" if lines else "")

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self.close()
