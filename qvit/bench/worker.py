"""A process that is measured: loads one engine or peer, answers once, then runs when it is told to.

    python -m qvit.bench.worker '{"engine": "cpu", "path": "model.qvit", ...}'

It imports nothing but what a program that classifies images would. Requests and replies are lines of JSON on stdin and stdout;
whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Serves until stdin is closed; the first reply comes with the first answer."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")

    request = json.loads(sys.argv[1])
    try:
        predict = _load(request)
        images = np.random.default_rng(0).standard_normal(request["shape"], dtype=np.float32)
        logits = np.asarray(predict(images))
        if logits.ndim != 2 or len(logits) != len(images) or not np.isfinite(logits).all():
            raise RuntimeError(f"its answer is no table of finite logits, but {logits.dtype}{list(logits.shape)}")
        reply({})
        for line in sys.stdin:
            order = json.loads(line)
            reply({"ms": time_calls(lambda: predict(images), order["seconds"], order["calls"]), **memory()})
    except Exception as error:  # whatever a foreign library raises is told to the parent, which goes on without it
        reply({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise SystemExit(1) from error


def _load(request: dict[str, Any]) -> Predict:
    path, threads = Path(request["path"]), request["threads"]
    if request["peer"] is None:
        import qvit

        # The reference engine takes its threads from OMP_NUM_THREADS.
        options = {} if request["engine"] == "reference" else {"threads": threads}
        return qvit.load(path, engine=request["engine"], **options)  # type: ignore[return-value]
    from qvit.bench.peers import peer_named

    return peer_named(request["peer"]).load(path, request["shape"][0], threads)


def time_calls(call: Callable[[], Any], seconds: float, calls: int) -> list[float]:
    """Milliseconds of each call, after one that is not counted.

    Goes on until ``seconds`` have passed and there are at least ``calls``.
    """
    call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < calls or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - before))
    return times


def memory() -> dict[str, float]:
    """Resident memory of this process in MB of 2^20 bytes: at most so far and now; empty where the system does not say.

    From /proc, since `resource.getrusage` counts what the parent had when it forked.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("VmHWM", "VmRSS")))
    return {"peak_mb": int(fields["VmHWM"].split()[0]) / 1024, "now_mb": int(fields["VmRSS"].split()[0]) / 1024}


if __name__ == "__main__":
    main()
