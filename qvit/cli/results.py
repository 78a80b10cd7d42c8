"""The ``--json`` option of the commands."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvit.report_file import write_report


def write_results(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the result file of this command line, if one is wanted."""
    if path is not None:
        write_report(path, rows, command_line())


def command_line() -> list[str]:
    """The command that is running, for a result file."""
    return ["qvit", *sys.argv[1:]]
