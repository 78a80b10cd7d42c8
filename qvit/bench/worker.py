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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Calls(Protocol):
    """What is measured: the same call again and again."""

    def __call__(self) -> Any:
        """One call; returns when its result is there."""
        ...

    def array(self) -> np.ndarray:
        """The result of a call: logits [B, classes]."""
        ...

    def settle(self) -> None:
        """Calls until times and memory no longer hold what happens once."""
        ...

    def facts(self) -> dict[str, Any]:
        """What else to say with the times."""
        ...


class HostCalls:
    """`Calls` on the CPU, of normalised float32 images in arrays."""

    def __init__(self, predict: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]) -> None:
        self._predict = predict
        self._images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def __call__(self) -> np.ndarray:
        return np.asarray(self._predict(self._images))

    array = __call__

    def settle(self) -> None:
        """Nothing happens once."""

    def facts(self) -> dict[str, Any]:
        return {}


def main() -> None:
    """Serves until stdin is closed; the first reply comes with the first answer."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")

    request = json.loads(sys.argv[1])
    try:
        calls = _open(request)
        logits = calls.array()
        if logits.ndim != 2 or len(logits) != request["shape"][0] or not np.isfinite(logits).all():
            raise RuntimeError(f"its answer is no table of finite logits, but {logits.dtype}{list(logits.shape)}")
        reply({})
        calls.settle()
        for line in sys.stdin:
            order = json.loads(line)
            reply({"ms": time_calls(calls, order["seconds"], order["calls"]), **memory(), **calls.facts()})
    except Exception as error:  # whatever a foreign library raises is told to the parent, which goes on without it
        reply({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise SystemExit(1) from error


def _open(request: dict[str, Any]) -> Calls:
    """Loads what the request names; with a ``device``, for images there."""
    return _on_device(request) if request.get("device") else _on_host(request)


def _on_host(request: dict[str, Any]) -> Calls:
    path, threads = Path(request["path"]), request["threads"]
    if request["peer"] is None:
        import qvit

        # The reference engine takes its threads from OMP_NUM_THREADS.
        options = {} if request["engine"] == "reference" else {"threads": threads}
        return HostCalls(qvit.load(path, engine=request["engine"], **options), request["shape"])  # type: ignore[arg-type]
    from qvit.bench.peers import peer_named

    peer: Any = peer_named(request["peer"])
    return HostCalls(peer.load(path, request["shape"][0], threads), request["shape"])


def _on_device(request: dict[str, Any]) -> Calls:
    import torch

    from qvit.bench.on_device import DeviceCalls, random_images

    path, shape, device = Path(request["path"]), request["shape"], torch.device(request["device"])
    predict: Any
    if request["peer"] is None:
        import qvit

        predict = qvit.load(path, engine=request["engine"], device=request["device"])
    else:
        from qvit.bench.peers import peer_named

        peer: Any = peer_named(request["peer"])
        predict = peer.load(path, shape[0], request["device"])
    return DeviceCalls(predict, random_images(shape, request["input"], device))


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
