"""Low-bit training on 1 to 8 GPUs of one host: images a second, efficiency, communication, memory, and the same accuracy.

    python benchmarks/train_scaling.py --processes 1 2 4 8 --batch 256 --train 256 --set schedule.epochs=10 \\
        --json benchmarks/results/train_scaling-h100x8.json
    python benchmarks/train_scaling.py --processes 1 8 --model deit_small_distilled_patch16_224 --batch 64 8 \\
        --json benchmarks/results/train_scaling-deit-small-h100x8.json

The first is Imagenette's network, timed and trained; the second that of the paper, in the two batches that make up its 512
images on 8 and on 64 GPUs. `make_results.py` makes tables of them, and the estimate of the paper's epochs (`estimate.py`).

For each number of processes the loop of `qvit train` is launched, under torchrun where there are several, a GPU each, with the
batch per GPU fixed (256 by default), full Q-ViT with soft teacher logits at 2 bits. Its steps are timed in turns with and
without the exchange of gradients:

- `train_images_per_s` over all GPUs, and `efficiency`: that, over the number of GPUs times one GPU's, in percent;
- `communication`: the share of a step's time that the exchange of gradients adds, in percent; `allreduce_ms` is what the
  all-reduce of as many bytes takes alone, `gradient_mb` (10^6 bytes) how many they are;
- `peak_gb`: 10^9 bytes on the GPU that needs most.

With `--train TOTAL` the recipe is trained to its end as well (without `--batch`, that alone), TOTAL images a step over all
GPUs, and the frozen integers are evaluated: with the same total, any number of GPUs does the same optimizer steps on the same
images, so `integer_top1` should be one GPU's; `difference` is what lies between them, in points.

Steps are timed on random images on the device, and of a model with random weights, which take as long as others; `--train`
reads Imagenette and the float model from `--data-dir`. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from experiments import DATA_SETS, Bench, Experiment
from harness import VARIANTS, model_overrides, public, write_random_images

import qvit
import qvit.training.loop
from qvit.cli.show import show_table
from qvit.engines.reference import ReferenceEngine
from qvit.errors import QvitError
from qvit.report_file import write_report
from qvit.training.data import evaluation_loader, open_split
from qvit.training.engine import fit, open_loop
from qvit.training.evaluate import evaluate
from qvit.training.loop import TrainingLoop
from qvit.training.recipe import Recipe


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = _options(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch, train in [*((batch, False) for batch in options.batch), *([(options.train, True)] if options.train else [])]:
            base = _changes(options, train)
            if not train:
                recipe = Recipe.load(options.recipe, base)
                source = write_random_images(folder / f"images{batch}", recipe, max(batch * max(options.processes), 64))
                base += [f"data.train={source}", f"data.val={source}"]
            for processes in options.processes:
                row = _launch(folder, base, batch, processes, train, options)
                rows.append(_beside_one(row, rows))
                if options.json:
                    write_report(options.json, rows, ["python", "benchmarks/train_scaling.py", *options.command])
    _show(rows, options)
    return rows


def _changes(options: argparse.Namespace, train: bool) -> list[str]:
    """The overrides that all measurements share; of a training those of the data folder's files as well."""
    changes = [*VARIANTS["soft"], "quant.bits=2", "needs_gpu=false", *options.set]
    changes += model_overrides(options.model, options.model_args)
    if not train:
        return [*changes, "model.checkpoint=null", "data.workers=0", "data.cache=device", "log_every=1000000"]
    if options.data == "digits":
        return [*changes, "data.train=digits"]
    bench = Bench(options.data_dir, options.runs, options.workers)
    recipe = bench.recipe(Experiment(options.data, "soft", 2, 0))
    files = {
        "data.train": recipe.data.train,
        "data.val": recipe.data.val,
        "model.checkpoint": str(bench.float_checkpoint(options.data)),
    }
    return [*changes, f"data.workers={options.workers}", *(f"{k}={json.dumps(v)}" for k, v in files.items())]


def _launch(
    folder: Path, changes: list[str], batch: int, processes: int, train: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures in processes of their own; the row of the first."""
    each = batch // processes if train else batch
    output = folder / f"{'trained' if train else 'timed'}-{batch}-{processes}"
    task = {
        "recipe": options.recipe,
        "changes": [*changes, f"batch_size={each}"],
        "output": str(output),
        "train": train,
        **{name: getattr(options, name) for name in ("rounds", "steps", "warmup")},
    }
    path = folder / "task.json"
    path.write_text(json.dumps(task))
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--worker", str(path)]
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}
    environment.setdefault("OMP_NUM_THREADS", "1" if options.device == "cpu" else "8")
    if options.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=environment, check=False)
    result = Path(f"{output}.json")
    if done.returncode or not result.exists():
        raise QvitError(f"Training in {processes} processes ended with status {done.returncode}: its messages are above.")
    row = json.loads(result.read_text())
    what = {
        "processes": processes,
        "batch": each,
        "batch_total": each * processes,
        "data": options.data if train else "random images",
    }
    return {**what, **row, "recipe": options.recipe, "overrides": " ".join(public([*VARIANTS["soft"], *options.set]))}


def _beside_one(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with what it is beside one GPU's of the same kind, where ``rows`` or it is that one."""
    trained = "integer_top1" in row
    same = "batch_total" if trained else "batch"
    alike = (r for r in [*rows, row] if r["processes"] == 1 and ("integer_top1" in r) == trained and r[same] == row[same])
    single = next(alike, None)
    if single is None:
        return row
    if trained:
        return row | {"difference": row["integer_top1"] - single["integer_top1"]}
    return row | {"efficiency": 100 * row["train_images_per_s"] / (row["processes"] * single["train_images_per_s"])}


def worker(path: Path) -> None:
    """One process: measures and, where it is the first, writes the row."""
    task = json.loads(path.read_text())
    recipe = Recipe.load(task["recipe"], task["changes"])
    row = _train(recipe, Path(task["output"])) if task["train"] else _time_steps(recipe, Path(task["output"]), task)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(f"{task['output']}.json").write_text(json.dumps(row))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _facts(recipe: Recipe) -> dict[str, Any]:
    return {
        "model": recipe.model.name if recipe.model else None,
        "method": recipe.method,
        "weight_bits": recipe.quant.weight_bits or recipe.quant.bits,
        "act_bits": recipe.quant.act_bits or recipe.quant.bits,
        "seed": recipe.seed,
    }


def _train(recipe: Recipe, output: Path) -> dict[str, Any]:
    result = fit(recipe, output, progress=False)
    row = _facts(recipe) | {
        "epochs": result.epochs,
        "steps": result.steps,
        "images": result.images,
        "fake_top1": result.top1,
        "train_seconds": result.train_seconds,
        "train_images_per_s": result.train_images_per_s,
        "loader_idle": result.loader_idle,
        "peak_gb": _largest(result.peak_gb, next(result.model.parameters()).device),
    }
    if int(os.environ.get("RANK", "0")) == 0:
        student: Any = result.model
        device = next(student.parameters()).device
        images = evaluation_loader(open_split(recipe.data, "val"), student.qvit.preprocessing, 100, recipe.data.workers)
        engine = ReferenceEngine(qvit.freeze(student), device)
        row |= {"integer_top1": evaluate(engine.forward, images, device).top1, "engine": engine.name}
    return row


def _time_steps(recipe: Recipe, output: Path, task: dict[str, Any]) -> dict[str, Any]:
    loop = open_loop(recipe, output, progress=False)
    images, labels = next(iter(loop.loader))
    times: dict[bool, list[float]] = {True: [], False: []}
    with loop.stepping():
        _steps(loop, images, labels, task["warmup"], synced=True)
        _steps(loop, images, labels, task["warmup"], synced=False)
        for _ in range(task["rounds"]):
            for synced in (True, False):
                times[synced].append(_steps(loop, images, labels, task["steps"], synced))
    step, alone = statistics.median(times[True]), statistics.median(times[False])
    gradients = sum(p.numel() * p.element_size() for p in loop.model.parameters() if p.requires_grad)
    # Since the loop was made: a recorded step allocates while it is recorded, and no more.
    peak = torch.cuda.max_memory_allocated() / 1e9 if loop.device.type == "cuda" else 0.0
    processes = loop.accelerator.num_processes
    return _facts(recipe) | {
        "rounds": task["rounds"],
        "steps_a_round": task["steps"],
        "ms_median": 1000 * step,
        "ms_without_allreduce": 1000 * alone,
        "train_images_per_s": recipe.batch_size * processes / step,
        "communication": max(100 * (1 - alone / step), 0.0) if processes > 1 else 0.0,
        "allreduce_ms": 1000 * _allreduce_seconds(gradients, loop.device, task["rounds"]),
        "gradient_mb": gradients / 1e6,
        "peak_gb": _largest(peak, loop.device),
    }


def _steps(loop: TrainingLoop, images: torch.Tensor, labels: torch.Tensor, steps: int, synced: bool) -> float:
    """Seconds a step, of the slowest process."""
    _wait(loop.device)
    start = time.perf_counter()
    for _ in range(steps):
        with nullcontext() if synced else patch.object(qvit.training.loop, "average_gradients", lambda *_: None):
            loop.train_step(images, labels)
    if loop.device.type == "cuda":
        torch.cuda.synchronize()
    return _largest((time.perf_counter() - start) / steps, loop.device)


def _allreduce_seconds(count: int, device: torch.device, rounds: int) -> float:
    """Seconds of one all-reduce of so many bytes, alone; 0 in a single process."""
    if not torch.distributed.is_initialized():
        return 0.0
    buffer = torch.zeros(count // 4, device=device)
    seconds = []
    for _ in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        torch.distributed.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return _largest(statistics.median(seconds[1:]), device)


def _wait(device: torch.device) -> None:
    """All processes, and what their devices are doing."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _largest(value: float, device: torch.device) -> float:
    """The largest of all processes."""
    if not torch.distributed.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor.item()


def _show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    def cell(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    keys = (
        ("batch", "d"),
        ("train_images_per_s", ",.0f"),
        ("efficiency", ".1f"),
        ("communication", ".1f"),
        ("allreduce_ms", ".2f"),
        ("peak_gb", ".1f"),
        ("integer_top1", ".2f"),
        ("difference", "+.2f"),
    )
    lines = [(row["processes"], *(cell(row, key, form) for key, form in keys)) for row in rows]
    columns = ("GPUs", "batch each", "images/s", "efficiency %", "communication %", "all-reduce ms", "peak GB")
    columns = (*columns, "integer top-1", "to one GPU")
    show_table("Training over the GPUs of one host", columns, lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers of GPUs")
    parser.add_argument(
        "--batch", nargs="+", type=int, help="images a step and GPU, one measurement each; 256 by default, without --train"
    )
    parser.add_argument("--train", type=int, metavar="TOTAL", help="train to the end with so many images a step over all GPUs")
    parser.add_argument("--recipe", help="name or path; by default the recipe of --data")
    parser.add_argument("--set", nargs="+", default=[], help="key=value that changes the recipe")
    parser.add_argument("--model", help="timm's name of another model than the recipe's")
    parser.add_argument("--model-args", help="its arguments, as YAML")
    parser.add_argument("--rounds", type=int, default=7, help="turns with, and without, the all-reduce")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--warmup", type=int, default=6, help="steps before the first turn")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", choices=list(DATA_SETS), default="imagenette", help="what --train reads")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("QVIT_DATA", "../shared/data")), help="folder of the data"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that packed data are unpacked into")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode images, of each training process")
    parser.add_argument("--json", type=Path, help="result file to write")
    options = parser.parse_args(arguments)
    options.command = public(sys.argv[1:] if arguments is None else arguments)
    options.recipe = options.recipe or DATA_SETS[options.data].recipe
    options.batch = options.batch or ([] if options.train else [256])
    for name in ("processes", "batch"):
        if min(getattr(options, name), default=1) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.train is not None and options.train < 1:
        parser.error("--train must be at least 1")
    if options.train and options.model:
        parser.error("--train trains the network of the recipe: time that of --model in another call")
    if options.train and any(options.train % count for count in options.processes):
        parser.error(f"--train {options.train} cannot be shared evenly by {options.processes} processes")
    if options.device == "cuda" and max(options.processes) > torch.cuda.device_count():
        parser.error(f"--processes {max(options.processes)} is more than the {torch.cuda.device_count()} GPUs there are")
    return options


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--worker"]:
            worker(Path(sys.argv[2]))
        else:
            main()
    except QvitError as error:
        sys.exit(f"error: {error}")
