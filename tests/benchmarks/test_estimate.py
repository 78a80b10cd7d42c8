"""The estimate is arithmetic on measured times."""

from __future__ import annotations

import pytest
from estimate import EPOCHS, IMAGES, estimate, estimates

ROW = {"processes": 8, "batch": 64, "ms_median": 100.0, "gradient_mb": 88.0}


def test_one_host_is_what_was_measured() -> None:
    one = estimate(ROW, hosts=1)
    assert (one.gpus, one.batch_total, one.step_ms, one.exchange_ms, one.measured) == (8, 512, 100, 0, True)
    assert one.images_per_s == pytest.approx(5120)
    assert one.hours == pytest.approx(EPOCHS * IMAGES / 5120 / 3600)


def test_hosts_exchange_gradients_in_a_ring() -> None:
    eight = estimate(ROW, hosts=8, host_gb_per_s=44.0)
    # Seven eighths of 88 MB twice, at 44 MB a millisecond.
    assert eight.exchange_ms == pytest.approx(3.5)
    assert eight.step_ms == pytest.approx(103.5)
    assert eight.images_per_s == pytest.approx(64 * 64 / 0.1035)
    assert not eight.measured


def test_only_whole_hosts_of_the_measured_kind() -> None:
    rows = [ROW, {**ROW, "batch": 8}, {**ROW, "processes": 1}, {"processes": 8, "integer_top1": 90.0}]
    assert [(e.gpus, e.batch) for e in estimates(rows)] == [(8, 8), (8, 64), (64, 8), (64, 64)]
    assert [(e.gpus, e.batch) for e in estimates([{**ROW, "processes": 4}])] == [(8, 64), (64, 64)]
    assert estimates([{**ROW, "processes": 3}]) == []
    assert estimates([]) == []
