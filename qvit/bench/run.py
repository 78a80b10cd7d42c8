"""The whole comparison: makes the models once, then measures every batch size and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from qvit.bench.child import Child, ChildError
from qvit.bench.peers import AnyPeer, is_installed, missing_packages
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
        threads: of the engine and of every peer, on the CPU.
        device: ``cuda``, .. where all run there, with images that lie there already: uint8 for the engine, floats of its own
            type for a peer. By default the CPU, where all get float32 images.
        float_images: whether the engine is also timed with float32 images on the device, with the first file.
        rounds: turns of each.
        seconds: a turn, at least.
        starts: cold starts, of which the median counts.
    """

    engine: str
    batches: Sequence[int] = (1,)
    threads: Sequence[int] = (1,)
    device: str | None = None
    float_images: bool = False
    rounds: int = 15
    seconds: float = 0.25
    starts: int = 3


def make_random_model(name: str, bits: int, path: Path, residual: str = "float32") -> None:
    """`qvit.bench.models.write_random_model` in a process of its own; raises `InputError` where it fails."""
    for package in ("torch", "timm"):
        if not is_installed(package):
            raise MissingDependencyError(f"Making {name} with random weights needs {package}: pip install 'qvit[train]'.")
    try:
        with Child("qvit.bench.prepare", {"name": name, "bits": bits, "path": str(path), "residual": residual}):
            pass
    except ChildError as error:
        raise InputError(f"{name} cannot be made with {bits} bits: {error}") from None


def compare(
    files: Path | Sequence[Path],
    peers: Sequence[AnyPeer],
    settings: Settings,
    folder: Path,
    progress: Progress,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measures an engine beside its peers.

    Args:
        files: the .qvit file, or several of one architecture, as of several widths, which then take turns with each other and
            with the peers.
        peers: to compare with; one that is not installed or fails is left out, and ``note`` says so.
        settings: how.
        folder: for the peers' models; those of this architecture that lie there already are used again.
        progress: called as ``progress(items, total, what)``; yields the items.
        note: takes sentences for the user.

    Returns:
        Rows of a result file. The engine's own have ``engine`` and no ``peer``; a peer's have its ``peer``, its own times, and
        ``ratio_to_peer``, how many times faster the engine is with the file of that width. Each file's rows begin with the
        engine's. A file that cannot be measured is left out as a peer is, if there are others.

    Raises:
        InputError: the engine itself fails.
    """
    paths = [files] if isinstance(files, Path) else list(files)
    models = {path: IntegerModel.load(path) for path in paths}
    size = models[paths[0]].preprocessing.input_size
    prepared = _prepare(paths[0], peers, settings.batches, folder, progress, note)
    own = [_Contestant(None, settings.engine, path, "engine", "uint8") for path in paths]
    if settings.device and settings.float_images:
        own.append(_Contestant(None, settings.engine, paths[0], "engine", "float32"))
    rows: list[dict[str, Any]] = []
    for batch in settings.batches:
        for threads in [1] if settings.device else settings.threads:
            contestants = [*own]
            for peer, made_for, path in prepared:
                if made_for == batch:
                    contestants.append(_Contestant(peer, None, path, peer.title, getattr(peer, "dtype", "float32")))
            measured = _measure(contestants, [batch, *size], threads, settings, progress, note)
            for path in paths:
                weight_bits, act_bits = models[path].block_bits()
                facts = {"model": models[path].name, "weight_bits": weight_bits, "act_bits": act_bits, "batch": batch}
                facts["residual"] = models[path].residual
                facts |= {} if settings.device else {"threads": threads}
                rows += [{**facts, **row} for row in _rows(path, measured, batch, settings.device is not None)]
    return rows


@dataclass(frozen=True)
class _Contestant:
    peer: AnyPeer | None
    engine: str | None
    path: Path
    title: str
    input: str  # type of the images on a device

    @property
    def name(self) -> str:
        return self.peer.name if self.peer else f"The engine {self.engine}"

    def start(self, shape: Sequence[int], threads: int, settings: Settings) -> tuple[Child, list[float]]:
        """Starts its process so many times, one after the other -> the last one, and the seconds to each first answer."""
        request: dict[str, Any] = {
            "engine": self.engine,
            "peer": self.peer.name if self.peer else None,
            "path": str(self.path),
            "shape": list(shape),
        }
        environment = {}
        if settings.device:
            request |= {"device": settings.device, "input": self.input}
        else:
            request |= {"threads": threads}
            environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        child = Child("qvit.bench.worker", request, environment)
        seconds = [child.start_seconds]
        while len(seconds) < settings.starts and seconds[0] < _SLOW_START:
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
    peers: Sequence[AnyPeer],
    batches: Sequence[int],
    folder: Path,
    progress: Progress,
    note: Callable[[str], None],
) -> list[tuple[AnyPeer, int, Path]]:
    """Makes the model of each peer and batch size; (peer, batch, folder) of those that could be made."""
    usable = []
    for peer in peers:
        if missing := missing_packages(peer):
            are = "is" if len(missing) == 1 else "are"
            extra = "pip install 'qvit[bench]'"
            note(f"{peer.name} is left out, since {' and '.join(missing)} {are} not installed: {extra}.")
        else:
            usable.append(peer)
    made: list[tuple[AnyPeer, int, Path]] = []
    failed: set[str] = set()
    jobs = [(peer, batch) for peer in usable for batch in batches]
    for peer, batch in progress(jobs, len(jobs), "preparing peers"):
        path = folder / (peer.model if peer.any_batch else f"{peer.model}-{batch}")
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


@dataclass
class _Measured:
    """A contestant's process and what it says."""

    contestant: _Contestant
    child: Child
    starts: list[float]
    rounds: list[list[float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    def turn(self, settings: Settings) -> list[float]:
        """Milliseconds of the calls of a turn; none any more where one has failed."""
        if self.failed:
            return []
        try:
            reply = self.child.ask({"seconds": settings.seconds, "calls": _CALLS})
        except ChildError as error:
            self.failed = str(error)
            return []
        facts = {"rss_mb": reply.get("peak_mb"), "rss_now_mb": reply.get("now_mb"), "gpu_mb": reply.get("gpu_mb")}
        facts["device"] = reply.get("device")
        self.facts = {key: value for key, value in facts.items() if value is not None}
        return reply["ms"]


def _measure(
    contestants: Sequence[_Contestant],
    shape: Sequence[int],
    threads: int,
    settings: Settings,
    progress: Progress,
    note: Callable[[str], None],
) -> list[_Measured]:
    """One batch size and number of threads: those that could be measured, the engine's own first."""
    what = f"batch {shape[0]}" + ("" if settings.device else f", {threads} thread{'s' if threads > 1 else ''}")
    own = sum(contestant.peer is None for contestant in contestants)

    def leave_out(contestant: _Contestant, error: str) -> None:
        nonlocal own
        own -= contestant.peer is None
        if not own:
            raise InputError(f"The engine {settings.engine} cannot be measured at {what}: {error}") from None
        where = "" if contestant.peer else f" with {contestant.path.name} and {contestant.input} images"
        note(f"{contestant.name} is left out at {what}{where}: {error}")

    with ExitStack() as stack:
        running: list[_Measured] = []
        for contestant in progress(contestants, len(contestants), f"{what}: starting"):
            try:
                child, starts = contestant.start(shape, threads, settings)
            except ChildError as error:
                leave_out(contestant, str(error))
                continue
            running.append(_Measured(contestant, stack.enter_context(child), starts))
        turns = [partial(one.turn, settings) for one in running]
        times = take_turns(turns, progress(range(settings.rounds), settings.rounds, what))
    for one, rounds in zip(running, times, strict=True):
        one.rounds = rounds
        if one.failed:
            leave_out(one.contestant, one.failed)
    return [one for one in running if not one.failed]


def _rows(path: Path, measured: Sequence[_Measured], batch: int, on_device: bool) -> Iterator[dict[str, Any]]:
    """The engine's rows with a file, and the peers' beside the first of them."""
    own = [one for one in measured if one.contestant.peer is None and one.contestant.path == path]
    if not own:
        return
    for one in [*own, *(one for one in measured if one.contestant.peer is not None)]:
        contestant, timing = one.contestant, Timing.of(one.rounds)
        row: dict[str, Any] = {"engine": contestant.engine} if contestant.peer is None else {"peer": contestant.peer.name}
        row |= {
            "title": contestant.title,
            "ms_median": timing.median,
            "ms_p10": timing.p10,
            "ms_p90": timing.p90,
            "images_per_s": 1e3 * batch / timing.median,
            "calls": sum(map(len, one.rounds)),
            **({"input": contestant.input} if on_device else {}),
            **one.facts,
            "start_seconds": median(one.starts),
            "file_bytes": contestant.file_bytes,
        }
        if contestant.peer is not None:
            row["ratio_to_peer"], row["ratio_p10"], row["ratio_p90"] = ratio(own[0].rounds, one.rounds)
        yield row
