"""Compares the CPU engine, code by code, with what the reference engine gave elsewhere.

    python .ci/engine_check.py FOLDER [ISA]

Fails where another instruction set than ISA runs. The folder is that of `engine_cases.py`. Needs NumPy and safetensors alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import qvit

LEAST_CODES = 100.0  # percent, at the worst point: float steps are correctly rounded, so engines agree exactly


def main() -> None:
    folder = Path(sys.argv[1])
    files = sorted(folder.glob("*.qvit"))
    if not files:
        sys.exit(f"{folder} holds no models")
    for file in files:
        runner = qvit.load(file, engine="cpu", threads=2)
        isa = runner.engine.isa
        if [isa] != (sys.argv[2:] or [isa]):
            sys.exit(f"{isa} runs instead of {sys.argv[2]}")
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
