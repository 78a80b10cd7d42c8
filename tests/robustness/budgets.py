"""How long the tests of this room go on: moments in the suite, minutes with QVIT_SOAK=1 in the environment (`make soak`)."""

from __future__ import annotations

import os

from hypothesis import settings

LONG = os.environ.get("QVIT_SOAK", "") not in ("", "0")

SECONDS = 60.0 if LONG else 1.5  # that threads hammer
CALLS = 10_000 if LONG else 400  # over which memory must stay flat


def examples(short: int) -> settings:
    """Settings for a property: so many examples in the suite; fifty times as many, new ones each time, when it is long."""
    return settings(max_examples=50 * short, derandomize=False) if LONG else settings(max_examples=short)
