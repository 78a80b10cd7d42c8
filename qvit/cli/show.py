"""Tables and progress bars of the commands: results go to stdout, progress to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qvit.architecture import SwinArchitecture, VitArchitecture

T = TypeVar("T")
_PIPE_WIDTH = 200  # columns where the output is no terminal, so that nothing is cut off there


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> None:
    """Prints a table; the first ``left`` columns are aligned to the left, the others to the right."""
    table = Table(box=box.SIMPLE)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    console = _console()
    console.print(Text(title, style="italic"))  # not the table's own title, which would be wrapped at the table's width
    console.print(table)


def show_facts(facts: Mapping[str, object]) -> None:
    """Prints names and values, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(str(value)))
    _console().print(table)


def note(sentence: str) -> None:
    """Tells the user something beside the results, on stderr."""
    print(f"note: {sentence}", file=sys.stderr)


def widths(weight_bits: int, act_bits: int, mixed: bool = False) -> str:
    """Bits in words; of a ``mixed`` model they are those that most layers have."""
    return f"weights {weight_bits} bits, activations {act_bits} bits" + (" in most layers (mixed)" if mixed else "")


def shape(architecture: VitArchitecture | SwinArchitecture) -> str:
    """Blocks, widths, heads and tokens in words."""
    a = architecture
    blocks = f"{a.depth} block" + ("" if a.depth == 1 else "s")
    if isinstance(a, SwinArchitecture):
        heads = ", ".join(map(str, a.num_heads))
        wide = " to ".join(map(str, dict.fromkeys((a.embed_dim, a.num_features))))
        stages = f"{a.stages} stage" + ("" if a.stages == 1 else "s")
        return f"{blocks} in {stages}, {wide} wide, {heads} heads, {a.num_tokens} tokens in the first stage"
    return f"{blocks}, {a.embed_dim} wide, {a.num_heads} heads, {a.num_tokens} tokens"


def count(value: float) -> str:
    """A number with thousands separators."""
    return f"{value:,.0f}"


def progress(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """The items, with a progress bar on stderr while they are taken, where that is a terminal."""
    console = Console(stderr=True)
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total, description=what)
