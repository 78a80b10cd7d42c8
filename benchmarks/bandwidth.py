"""How many bytes a second this machine's memory moves: the bandwidth of the roofline's CPU (`qvit.analyze.roofline`).

    python benchmarks/bandwidth.py --json benchmarks/results/bandwidth-epyc-zen4-2cores.json

Copies arrays much larger than any cache, each thread one of its own, and counts bytes read and bytes written. Reports the best
and the median of all rounds: other programs on the machine only ever make it slower, so the best is nearest to the limit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from qvit.report_file import usable_cores, write_report

BYTES = 512 << 20  # of one array


def measure(threads: int, rounds: int, size: int) -> dict[str, Any]:
    """The row of a number of threads: GB/s (10^9 bytes read or written), best and median of the rounds."""
    arrays = [(np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            # copyto lets go of Python's lock.
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), arrays))
            rates.append(2 * size * threads / (time.perf_counter() - start) / 1e9)
    return {"threads": threads, "rounds": rounds, "gb_per_s_best": max(rates), "gb_per_s_median": median(rates)}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = [measure(threads, options.rounds, BYTES) for threads in range(1, usable_cores() + 1)]
    for row in rows:
        print(row)
    if options.json:
        words = [Path(word).name if "/" in word else word for word in (sys.argv[1:] if arguments is None else arguments)]
        write_report(options.json, rows, ["python", "benchmarks/bandwidth.py", *words])
    return rows


if __name__ == "__main__":
    main()
