"""The ablation of the paper, ours beside it: many short runs over the GPUs of one host, one row each in a result file.

    python benchmarks/ablation.py --data imagenette --gpus 8 --json benchmarks/results/ablation-imagenette-h100.json
    python benchmarks/ablation.py --data cifar10 --gpus 8 --json benchmarks/results/ablation-cifar10-h100.json
    python benchmarks/ablation.py --data imagenette --variants soft,statsq,anneal --bits 2:0,1,2 --json ...

A row is the last epoch's model, not the best one's: the validation images choose nothing. It has the top-1 of the float model
that the very same student starts from, of the fake-quantized graph, and of the frozen integers on the reference engine, all
on all validation images, and their agreement code by code on some. Where a data set's float model comes from our own recipe
(CIFAR-10), it is trained first, and is a row as well.

The file is written after every run. Rows that are there already, or in a file named with `--from`, are kept and not measured
again; a run that was cut short goes on from its last checkpoint, if the folder `--runs` is still there. With `--minutes` no
run starts that would end later than that, going by the longest of its kind so far.

The data folder (`--data-dir`, by default the environment variable QVIT_DATA, or ../shared/data) holds `imagenette224-*.tar`
and its teacher, or `cifar10.tar` (or `cifar10.tar.xz`, which is unpacked); scikit-learn's digits need none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments import DATA_SETS, Bench, Experiment
from harness import PAPER_METHODS, TITLES, VARIANTS, public

from qvit.cli.show import show_table
from qvit.errors import InputError, QvitError
from qvit.report_file import hardware, usable_cores, versions, write_report

POLL = 0.2  # seconds between two looks at the processes


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = _options(arguments)
    plan = make_plan(options)
    report = Report(options.json, options.command, options.taken_over)
    bench = Bench(options.data_dir, options.runs, options.workers, options.agreement_images, options.keep_runs)
    todo = [experiment for experiment in plan if not report.has(experiment)]
    for experiment in plan:
        if experiment.variant == "float":
            todo = _with_float_model(experiment, todo, bench, report)
    print(f"{len(plan)} experiments, {len(todo)} to run", file=sys.stderr, flush=True)
    failed = Crew(bench, report, options).work(todo) if todo else []
    _show([row for row in report.rows if any(_of(row, experiment) for experiment in plan)])
    if failed:
        raise QvitError(f"{len(failed)} of the experiments failed: {'; '.join(failed)}.")
    return report.rows


def _with_float_model(float_run: Experiment, todo: list[Experiment], bench: Bench, report: Report) -> list[Experiment]:
    """The experiments to run, without a float run whose model is there already.

    Raises:
        InputError: experiments need a float model that was trained and is not there: another one would not be the same.
    """
    checkpoint = bench.float_checkpoint(float_run.data)
    if checkpoint.exists():
        return [experiment for experiment in todo if experiment != float_run]
    if report.has(float_run) and any(experiment.data == float_run.data for experiment in todo):
        raise InputError(
            f"The result file has a float model's row and there is no {checkpoint}: put it back, or start a new file."
        )
    return todo


def make_plan(options: argparse.Namespace) -> list[Experiment]:
    """The experiments in the order in which they are started; a float model comes before what is made from it."""
    plan = []
    for data in options.data:
        if DATA_SETS[data].float_recipe:
            plan.append(Experiment(data, "float", 32, 0, tuple(options.set_float)))
    for bits, seeds in options.bits:
        for seed in seeds:
            plan += [Experiment(d, v, bits, seed, tuple(options.set)) for d in options.data for v in options.variants]
    return plan


def _of(row: dict[str, Any], experiment: Experiment) -> bool:
    return all(row.get(key) == value for key, value in experiment.key().items())


class Report:
    """The result file: what it holds already, and what is added.

    Args:
        path: of the file.
        command: the command line, without folders.
        taken_over: another result file, whose rows are taken over.

    Raises:
        InputError: a file is no result file, or was measured elsewhere: one file is one kind of machine.
    """

    def __init__(self, path: Path, command: list[str], taken_over: Path | None) -> None:
        self.path, self.command = path, command
        self.rows: list[dict[str, Any]] = []
        for file in (taken_over, path):
            if file is not None and file.exists():
                self.rows += [row for row in _read(file) if row not in self.rows]

    def has(self, experiment: Experiment) -> bool:
        """Whether an experiment was measured."""
        return any(_of(row, experiment) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row; it reaches the file at once."""
        self.rows.append(row)
        write_report(self.path, self.rows, ["python", "benchmarks/ablation.py", *self.command])


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        rows, cpu, before = report["rows"], report["hardware"]["cpu"], report["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file} is no result file: name another one.") from None
    now = hardware()
    if cpu != now["cpu"] or report["hardware"].get("gpu") != now.get("gpu") or before != versions():
        raise InputError(f"{file} was measured on another machine or with other versions: name another result file.")
    return rows


class Crew:
    """Worker processes, a GPU each (or a share of one), and who does what.

    Args:
        bench: where experiments are run.
        report: where their rows go.
        options: of the command line.
    """

    def __init__(self, bench: Bench, report: Report, options: argparse.Namespace) -> None:
        self.bench, self.report = bench, report
        self.start, self.minutes = time.monotonic(), options.minutes
        self.slots = [
            (slot, slot % options.gpus if options.gpus else None) for slot in range(max(options.gpus, 1) * options.per_gpu)
        ]
        self.context = multiprocessing.get_context("spawn")
        self.results: Any = self.context.Queue()
        self.failed: list[str] = []

    def work(self, todo: list[Experiment]) -> list[str]:
        """Runs all that can be run in time; returns what failed."""
        waiting = list(todo)
        workers = {slot: self._hire(slot, gpu) for slot, gpu in self.slots[: len(todo)]}
        busy: dict[int, Experiment | None] = dict.fromkeys(workers)
        try:
            while workers:
                for slot, (_, tasks) in workers.items():
                    if busy[slot] is None and (experiment := self._next(waiting)) is not None:
                        waiting.remove(experiment)
                        busy[slot] = experiment
                        tasks.put(experiment)
                if not any(busy.values()):
                    break
                self._hear(busy)
                for slot in [slot for slot, (process, _) in workers.items() if process.exitcode is not None]:
                    self._lost(busy.pop(slot), workers.pop(slot)[0].exitcode)
                    if waiting:
                        workers[slot], busy[slot] = self._hire(slot, dict(self.slots)[slot]), None
        finally:  # after Ctrl-C as well, which the runs answer by saving their state
            for process, tasks in workers.values():
                tasks.put(None)
                process.join()
        if waiting:
            print(f"{len(waiting)} experiments were not started: run the command again to go on", file=sys.stderr)
        return self.failed

    def _hire(self, slot: int, gpu: int | None) -> tuple[Any, Any]:
        tasks = self.context.Queue()
        before = dict(os.environ)
        # What the process sees, and how many threads it has, is settled before it starts.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // len(self.slots), 1)))
        if gpu is not None:
            visible = before.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        process = self.context.Process(target=_worker, args=(slot, self.bench, tasks, self.results))
        process.start()
        os.environ.clear()
        os.environ.update(before)
        return process, tasks

    def _next(self, waiting: list[Experiment]) -> Experiment | None:
        """The first experiment whose float model is there and that ends in time."""
        for experiment in waiting:
            ready = experiment.variant == "float" or self.bench.float_checkpoint(experiment.data).exists()
            if ready and self._in_time(experiment):
                return experiment
        return None

    def _in_time(self, experiment: Experiment) -> bool:
        if self.minutes is None:
            return True
        known = [
            row["wall_seconds"]
            for row in self.report.rows
            if row["data"] == experiment.data and (row["variant"] == "float") == (experiment.variant == "float")
        ]
        return time.monotonic() - self.start + max(known, default=0.0) <= 60 * self.minutes

    def _hear(self, busy: dict[int, Experiment | None]) -> None:
        """Takes one message of a worker, if there is one soon."""
        try:
            slot, row, error = self.results.get(timeout=POLL)
        except queue.Empty:
            return
        experiment = busy[slot]
        busy[slot] = None
        assert experiment is not None
        if error is None:
            self.report.add(row)
            shown = row.get("integer_top1", row["float_top1"])
            print(f"{experiment.name()}: {shown:.2f} in {row['train_seconds']:.0f} s", file=sys.stderr, flush=True)
        else:
            self.failed.append(f"{experiment.name()} ({error})")
            print(self.failed[-1], file=sys.stderr, flush=True)

    def _lost(self, experiment: Experiment | None, exitcode: int) -> None:
        what = experiment.name() if experiment else "an idle worker"
        self.failed.append(f"{what} (its process ended with status {exitcode})")
        print(self.failed[-1], file=sys.stderr, flush=True)


def _worker(slot: int, bench: Bench, tasks: Any, results: Any) -> None:
    """Runs experiments until there is none: a process of its own."""
    while (experiment := tasks.get()) is not None:
        try:
            results.put((slot, bench.run(experiment), None))
        except Exception as error:  # whatever it is, the other experiments go on
            message = " ".join(str(error).split())
            results.put((slot, None, message if isinstance(error, QvitError) else f"{type(error).__name__}: {message}"))


def _show(rows: list[dict[str, Any]]) -> None:
    """One line a data set, width and variant; means over seeds."""
    lines = []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["weight_bits"], row["variant"]), []).append(row)
    for (data, bits, variant), group in groups.items():

        def mean(key: str, form: str = ".2f", group: list[dict[str, Any]] = group) -> str:
            values = [row[key] for row in group if row.get(key) is not None]
            return format(fmean(values), form) if values else ""

        top1 = [row["integer_top1"] for row in group if "integer_top1" in row]
        spread = f" ± {stdev(top1):.2f}" if len(top1) > 1 else ""
        lines.append(
            (
                data,
                f"{bits}/{bits}",
                TITLES[variant],
                len(group),
                mean("float_top1"),
                mean("fake_top1"),
                mean("integer_top1") + spread,
                mean("agreement", ".1f"),
                mean("train_seconds", ".0f"),
                mean("train_images_per_s", ",.0f"),
                mean("peak_gb", ".1f"),
            )
        )
    columns = ("data", "bits", "method", "seeds", "float", "graph", "integers", "agree %", "seconds", "images/s", "GB")
    show_table("Ablation: top-1 in percent, means over seeds ± standard deviation", columns, lines, left=3)


def _seeds(text: str) -> tuple[int, list[int]]:
    bits, _, seeds = text.partition(":")
    return int(bits), [int(seed) for seed in seeds.split(",")] if seeds else [0]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="imagenette", help=f"some of {', '.join(DATA_SETS)}")
    parser.add_argument("--variants", default=",".join([*PAPER_METHODS, "ours"]), help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument(
        "--bits", nargs="+", type=_seeds, default=[(2, [0, 1, 2]), (4, [0]), (3, [0])], help="BITS[:SEED,SEED,..]; 2:0,1,2 4 3"
    )
    parser.add_argument("--set", nargs="+", default=[], help="key=value that changes every quantized run's recipe")
    parser.add_argument("--set-float", nargs="+", default=[], help="key=value that changes the float runs' recipe")
    parser.add_argument("--gpus", type=int, help="GPUs to use, all by default; 0 for the CPU")
    parser.add_argument("--per-gpu", type=int, default=1, help="runs at a time on each")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode images, of each run")
    parser.add_argument("--minutes", type=float, help="start no run that would end later")
    parser.add_argument("--agreement-images", type=int, default=200, help="images compared code by code")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("QVIT_DATA", "../shared/data")), help="folder of the data"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of runs and frozen files")
    parser.add_argument("--keep-runs", action="store_true", help="keep checkpoints after a row is written")
    parser.add_argument("--from", dest="taken_over", type=Path, help="result file whose rows are taken over")
    parser.add_argument("--json", type=Path, required=True, help="result file to write or to go on with")
    options = parser.parse_args(arguments)
    options.command = public(sys.argv[1:] if arguments is None else arguments)
    for name, known in (("data", DATA_SETS), ("variants", VARIANTS)):
        setattr(options, name, getattr(options, name).split(","))
        if unknown := [item for item in getattr(options, name) if item not in known]:
            parser.error(f"--{name} has no {unknown[0]!r}: name some of {', '.join(known)}")
    options.gpus = _gpus() if options.gpus is None else options.gpus
    if options.gpus > _gpus():
        parser.error(f"--gpus {options.gpus} is more than the {_gpus()} there are")
    return options


if __name__ == "__main__":
    try:
        main()
    except QvitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: run the command again to go on")
