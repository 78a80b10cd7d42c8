"""The entry point: help, exit status, errors as sentences."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qvit
import qvit.cli.inspect
from qvit.errors import InputError, SlowerWarning

Cli = Callable[..., Any]


def test_help_is_what_one_gets_without_a_command(cli: Cli) -> None:
    done = cli()
    assert (done.status, done.err) == (0, "")
    assert done.out == cli("--help").out
    assert "inspect" in done.out


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.status, done.out) == (0, f"qvit {qvit.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["fly"], "No such command 'fly'"),
        (["inspect"], "Missing argument"),
        (["inspect", "a.qvit", "--fast"], "No such option"),
        (["eval", "a.qvit", "--data", "digits", "--limit", "few"], "--limit"),
        (["eval", "a.qvit"], "Missing option '--data'"),
    ],
)
def test_mistakes_in_the_arguments_are_one_sentence(cli: Cli, arguments: list[str], part: str) -> None:
    cli(*arguments).refused(part, "--help'")


def _make_it_raise(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(qvit.cli.inspect, "model_cost", fail)


def test_errors_of_qvit_are_folded_into_one_line(cli: Cli, frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_it_raise(monkeypatch, InputError("It is\n  broken: mend it."))
    done = cli("inspect", frozen_file)
    done.refused()
    assert done.err == "error: It is broken: mend it.\n"


def test_a_slower_path_is_a_note_and_other_warnings_are_as_always(
    cli: Cli, frozen_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = qvit.cli.inspect.model_cost

    def warning(*args: Any) -> Any:
        warnings.warn("In parts, which is slower.", SlowerWarning, stacklevel=2)
        warnings.warn("Something else.", UserWarning, stacklevel=2)
        return original(*args)

    monkeypatch.setattr(qvit.cli.inspect, "model_cost", warning)
    with warnings.catch_warnings():  # as in a process of its own, where pytest records none
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(f"shown: {message}", file=sys.stderr)
        done = cli("inspect", frozen_file)
    assert done.status == 0
    assert "note: In parts, which is slower.\n" in done.err
    assert "shown: Something else.\n" in done.err
    assert "shown: In parts" not in done.err


def test_ctrl_c(cli: Cli, frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_it_raise(monkeypatch, KeyboardInterrupt())
    cli("inspect", frozen_file).refused("Stopped by Ctrl-C", status=130)


def test_a_missing_package_of_an_extra(cli: Cli, frozen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_it_raise(monkeypatch, ModuleNotFoundError("No module named 'timm.data'", name="timm.data"))
    cli("inspect", frozen_file).refused("qvit inspect needs timm: pip install 'qvit[train]'.")


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), ModuleNotFoundError("No module named 'x'", name="x")])
def test_defects_keep_their_traceback(cli: Cli, frozen_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _make_it_raise(monkeypatch, error)
    with pytest.raises(type(error)):
        cli("inspect", frozen_file)


def test_the_result_file_holds_the_command_line(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert cli("inspect", frozen_file, "--json", path).status == 0
    assert json.loads(path.read_text())["command"] == ["qvit", "inspect", str(frozen_file), "--json", str(path)]


def test_a_result_file_that_cannot_be_written(cli: Cli, frozen_file: Path, tmp_path: Path) -> None:
    cli("inspect", frozen_file, "--json", tmp_path).refused("cannot be written")
