"""The whole comparison: makes the models once, then measures every batch size and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from qvit.bench.child import Child, ChildError
from qvit.bench.peers import Peer, is_installed, missing_packages
from qvit.bench.turns import Timing, ratio, take_turns
from qvit.errors import InputError, MissingDependencyError
from qvit.integer.model import IntegerModel

Progress = Callable[[Iterable[Any], int, str], Iterator[Any]]

_CALLS = 3  # at least, a turn
_SLOW_START = 10.0  # seconds; what takes longer is started only once


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        engine: the engine's name.
        batches: images a call.
        threads: of the engine and of every peer.
        rounds: turns of each.
        seconds: a turn, at least.
        starts: cold starts, of which the median counts.
    """

    engine: str
    batches: Sequence[int] = (1,)
    threads: Sequence[int] = (1,)
    rounds: int = 15
    seconds: float = 0.25
    starts: int = 3


def make_random_model(name: str, bits: int, path: Path) -> None:
    """`qvit.bench.models.write_random_model` in a process of its own; raises `InputError` where it fails."""
    for package in ("torch", "timm"):
        if not is_installed(package):
            raise MissingDependencyError(f"Making {name} with random weights needs {package}: pip install 'qvit[train]'.")
    try:
        with Child("qvit.bench.prepare", {"name": name, "bits": bits, "path": str(path)}):
            pass
    except ChildError as error:
        raise InputError(f"{name} cannot be made with {bits} bits: {error}") from None


def compare(
    file: Path,
    peers: Sequence[Peer],
    settings: Settings,
    folder: Path,
    progress: Progress,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measures an engine beside its peers.

    Args:
        file: the .qvit file.
        peers: to compare with; one that is not installed or fails is left out, and ``note`` says so.
        settings: how.
        folder: for the peers' models; those of this architecture that lie there already are used again.
        progress: called as ``progress(items, total, what)``; yields the items.
        note: takes sentences for the user.

    Returns:
        Rows of a result file. The engine's own have ``engine`` and no ``peer``; a peer's have its ``peer``, its own times, and
        ``ratio_to_peer``, how many times faster the engine is.

    Raises:
        InputError: the engine itself fails.
    """
    model = IntegerModel.load(file)
    weight_bits, act_bits = model.block_bits()
    facts = {"model": model.name, "weight_bits": weight_bits, "act_bits": act_bits}
    prepared = _prepare(file, peers, settings.batches, folder, progress, note)
    rows: list[dict[str, Any]] = []
    for batch in settings.batches:
        for threads in settings.threads:
            shape = [batch, *model.preprocessing.input_size]
            contestants = [_Contestant(None, settings.engine, file, "engine")]
            contestants += [_Contestant(peer, None, path, peer.title) for peer, size, path in prepared if size == batch]
            here = {"batch": batch, "threads": threads}
            measured = _measure(contestants, shape, threads, settings, progress, note)
            rows += [{**facts, **here, **row} for row in measured]
    return rows


@dataclass(frozen=True)
class _Contestant:
    peer: Peer | None
    engine: str | None
    path: Path
    title: str

    def start(self, shape: Sequence[int], threads: int, starts: int) -> tuple[Child, list[float]]:
        """Starts its process so many times, one after the other -> the last one, and the seconds to each first answer."""
        request = {
            "engine": self.engine,
            "peer": self.peer.name if self.peer else None,
            "path": str(self.path),
            "shape": list(shape),
            "threads": threads,
        }
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        child = Child("qvit.bench.worker", request, environment)
        seconds = [child.start_seconds]
        while len(seconds) < starts and seconds[0] < _SLOW_START:
            child.close()
            child = Child("qvit.bench.worker", request, environment)
            seconds.append(child.start_seconds)
        return child, seconds

    @property
    def file_bytes(self) -> int:
        files = [self.path] if self.path.is_file() else [path for path in self.path.rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files)


def _prepare(
    file: Path,
    peers: Sequence[Peer],
    batches: Sequence[int],
    folder: Path,
    progress: Progress,
    note: Callable[[str], None],
) -> list[tuple[Peer, int, Path]]:
    """Makes the model of each peer and batch size; (peer, batch, folder) of those that could be made."""
    usable = []
    for peer in peers:
        if missing := missing_packages(peer):
            extra = "pip install 'qvit[bench]'"
            note(f"{peer.name} is left out, since {' and '.join(missing)} is not installed: {extra}.")
        else:
            usable.append(peer)
    made: list[tuple[Peer, int, Path]] = []
    failed: set[str] = set()
    jobs = [(peer, batch) for peer in usable for batch in batches]
    for peer, batch in progress(jobs, len(jobs), "preparing peers"):
        path = folder / f"{peer.model}-{batch}"
        if peer.model in failed:
            continue
        if not path.exists():
            path.mkdir()
            request = {"peer": peer.name, "file": str(file), "batch": batch, "path": str(path)}
            try:
                with Child("qvit.bench.prepare", request):
                    pass
            except ChildError as error:
                note(f"{peer.name} is left out, since its model cannot be made: {error}")
                failed.add(peer.model)
                continue
        made.append((peer, batch, path))
    return [entry for entry in made if entry[0].model not in failed]


def _measure(
    contestants: Sequence[_Contestant],
    shape: Sequence[int],
    threads: int,
    settings: Settings,
    progress: Progress,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One batch size and number of threads: a row each, the engine's first."""
    what = f"batch {shape[0]}, {threads} thread{'s' if threads > 1 else ''}"
    with ExitStack() as stack:
        running: list[tuple[_Contestant, Child, list[float]]] = []
        for contestant in progress(contestants, len(contestants), f"{what}: starting"):
            try:
                child, starts = contestant.start(shape, threads, settings.starts)
            except ChildError as error:
                if contestant.peer is None:
                    raise InputError(f"The engine {contestant.engine} cannot be measured at {what}: {error}") from None
                note(f"{contestant.peer.name} is left out at {what}: {error}")
                continue
            running.append((contestant, stack.enter_context(child), starts))
        memory: list[dict[str, float]] = [{} for _ in running]

        def turn(index: int) -> list[float]:
            reply = running[index][1].ask({"seconds": settings.seconds, "calls": _CALLS})
            memory[index] = {"rss_mb": reply["peak_mb"], "rss_now_mb": reply["now_mb"]} if "peak_mb" in reply else {}
            return reply["ms"]

        turns = [partial(turn, index) for index in range(len(running))]
        times = take_turns(turns, progress(range(settings.rounds), settings.rounds, what))
    rows = []
    for (contestant, _, starts), rounds, used in zip(running, times, memory, strict=True):
        timing = Timing.of(rounds)
        row: dict[str, Any] = {"engine": contestant.engine} if contestant.peer is None else {"peer": contestant.peer.name}
        row |= {
            "title": contestant.title,
            "ms_median": timing.median,
            "ms_p10": timing.p10,
            "ms_p90": timing.p90,
            "images_per_s": 1e3 * shape[0] / timing.median,
            "calls": sum(map(len, rounds)),
            **used,
            "start_seconds": median(starts),
            "file_bytes": contestant.file_bytes,
        }
        if contestant.peer is not None:
            row["ratio_to_peer"], row["ratio_p10"], row["ratio_p90"] = ratio(times[0], rounds)
        rows.append(row)
    return rows
