"""What commands print."""

from __future__ import annotations

import pytest

from qvit.cli.show import show_table


def test_a_title_longer_than_its_table_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    title = "a title that is a good deal longer than the narrow table under it"
    show_table(title, ["a", "b"], [(1, 2)])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == title
    assert any(line.split() == ["1", "2"] for line in rest)
