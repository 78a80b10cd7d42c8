"""Compares the CPU engine, code by code, with what the reference engine gave on another machine.

    QVIT_ISA=neon python .ci/aarch64_check.py FOLDER neon

The folder is that of `aarch64_cases.py`. Needs NumPy and safetensors alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import qvit

LEAST_CODES = 99.9  # percent, at the worst point


def main() -> None:
    folder, isa = Path(sys.argv[1]), sys.argv[2]
    files = sorted(folder.glob("*.qvit"))
    if not files:
        sys.exit(f"{folder} holds no models")
    for file in files:
        runner = qvit.load(file, engine="cpu", threads=2)
        if runner.engine.isa != isa:
            sys.exit(f"{runner.engine.isa} runs instead of {isa}")
        with np.load(file.with_suffix(".npz")) as expected:
            codes: dict[str, Any] = {}
            logits = np.asarray(runner.engine.forward(expected["pixels"], codes))
            points = set(expected.files) - {"pixels", "logits"}
            if set(codes) != points:
                sys.exit(f"{file.name}: the points of codes differ: {set(codes) ^ points}")
            worst = min((100 * float((codes[point] == expected[point]).mean()), point) for point in points)
            same = 100 * float((logits.argmax(1) == expected["logits"].argmax(1)).mean())
            print(
                f"{file.name}, {isa}: {worst[0]:.3f} % of codes equal at the worst point, {worst[1]}; same top-1 {same:.1f} %"
            )
            if worst[0] < LEAST_CODES or same < 100:
                sys.exit("the contract is not kept")


if __name__ == "__main__":
    main()
