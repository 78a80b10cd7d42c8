"""The demo's row and table, on a run that is cut short; `make demo` is the whole of it."""

import pytest

from qvit.cli import demo
from qvit.errors import InputError
from qvit.training.engine import fit
from qvit.training.recipe import Recipe


@pytest.fixture
def short_recipes(monkeypatch):
    load = Recipe.load
    monkeypatch.setattr(
        Recipe, "load", lambda name, changes=(): load(name, [*changes, "schedule.epochs=1", "schedule.warmup_epochs=0"])
    )


def test_a_run_reports_integers_that_agree(tmp_path, short_recipes):
    fit(Recipe.load("digits_float"), tmp_path / "float", progress=False)
    row = demo._run(3, "qvit", 0, tmp_path, 50.0)
    assert (tmp_path / "w3a3_qvit_0.qvit").stat().st_size == row["file_bytes"]
    assert row["agreement"] == 100
    assert row["codes_agreement"] == 100
    assert row["engine"] == "cpu"
    assert row["integer_top1"] == pytest.approx(row["fake_top1"], abs=0.3)
    assert (row["method"], row["weight_bits"], row["images"], row["float_top1"]) == ("qvit", 3, 360, 50.0)


def test_the_table_has_means_over_seeds(capsys):
    parent = {"float_top1": 97.0, "images": 360, "file_bytes": 1000, "train_seconds": 1.0}
    rows = [
        {
            "weight_bits": bits,
            "method": method,
            "fake_top1": 90.0 + seed,
            "integer_top1": 80.0 + seed,
            "agreement": 100.0,
            "file_bytes": 100 * bits,
            "train_seconds": 2.0,
        }
        for bits in demo._SEEDS
        for method in demo._METHODS
        for seed in demo._SEEDS[bits]
    ]
    demo._show([parent, *rows], 12.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "2/2" in line]
    assert len(lines) == 2
    for line in lines:
        assert "91.00" in line  # the mean of 90, 91 and 92
        assert "81.00" in line
        assert "5.0x" in line


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="not empty"):
        demo.command(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
