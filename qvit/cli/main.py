"""The entry point of the command line: ``qvit COMMAND ..``."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer

import qvit
from qvit.cli.show import note
from qvit.errors import QvitError, SlowerWarning, missing_package

USER_ERROR, INTERRUPTED = 2, 130

# Module and function of each command, in the order of --help.
_COMMANDS = {
    "demo": "demo",
    "train": "train",
    "eval": "evaluate",
    "quantize": "quantize",
    "freeze": "freeze",
    "predict": "predict",
    "inspect": "inspect",
    "bench": "bench",
    "report": "report",
}


def run() -> NoReturn:
    """Runs the command that the process was started with, and exits.

    Exit status: 0, or 2 after a mistake that the user can mend and 130 after Ctrl-C, each with one sentence on stderr.
    Anything else is a defect of qvit and keeps its traceback.
    """
    try:
        status = build()(args=sys.argv[1:] or ["--help"], prog_name="qvit", standalone_mode=False)
    except Exception as error:
        sys.exit(_status_of_usage_error(error))
    sys.exit(status if isinstance(status, int) else 0)


def build() -> typer.Typer:
    """The application with all commands."""
    app = typer.Typer(
        help="Low-bit vision transformers that really run low-bit: train, freeze to integers, run the integers.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    for name, module in _COMMANDS.items():
        function = importlib.import_module(f"qvit.cli.{module}").command
        app.command(name)(_one_sentence(function, name))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qvit {qvit.__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Options before the command."""


def _noted(show: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning: as a note, where something takes a slower path, else by ``show``."""

    def shown(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, SlowerWarning):
            note(str(message))
        else:
            show(message, category, *where)

    return shown


def _one_sentence(function: Callable[..., None], name: str) -> Callable[..., None]:
    """The command with errors that the user can mend turned into a sentence and an exit status."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _noted(warnings.showwarning)
                function(*args, **kwargs)
        except QvitError as error:
            _fail(error, USER_ERROR)
        except ModuleNotFoundError as error:
            missing = missing_package(error, f"qvit {name}")
            if missing is None:
                raise
            _fail(missing, USER_ERROR)
        except KeyboardInterrupt as error:
            _fail(str(error) or "Stopped by Ctrl-C; what was being written is left out.", INTERRUPTED)

    return wrapped


def _fail(message: object, status: int) -> NoReturn:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise typer.Exit(status)


def _status_of_usage_error(error: Exception) -> int:
    """Prints a mistake in the arguments as one sentence; raises any other error again."""
    # typer brings its own copy of click in newer versions, so its exceptions are known by what they can do.
    if not hasattr(error, "format_message"):
        raise error
    command = getattr(getattr(error, "ctx", None), "command_path", "qvit")
    print(f"error: {error.format_message()} Try '{command} --help'.", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    run()
