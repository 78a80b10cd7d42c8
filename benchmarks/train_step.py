"""What a training step costs: low-bit training against float fine-tuning of the same network, side by side in one run.

    python benchmarks/train_step.py --json benchmarks/results/train_step-h100.json
    python benchmarks/train_step.py --methods float,qvit --profile profile.txt

Each method is a `TrainingLoop` as `qvit train` makes it (recipe `imagenette`, ViT-S/14 at 224, 257 tokens, 256 images a step,
bf16 on a GPU), and each step is the loop's own `train_step`: mixing, the teacher's forward pass, the student's, the loss, the
backward pass, clipping and the optimizer. Images are random, normalised and on the device; reading them is not part of it,
but is timed apart (method `images`: crops and flips of images kept on the device).

Each method takes turns with float, round by round, so that a change of clocks meets both; then it makes room for the next. Of
each, a row has

- `train_images_per_s`, from the median over rounds, and `ms_median`, `ms_p10`, `ms_p90` of a step;
- `ratio_to_peer`: its images/s over float's in the same rounds;
- `peak_gb`: 10^9 bytes of tensors at the worst moment, first steps included: its own model, optimizer, teacher, images and
  activations; `reserved_gb`: what PyTorch took from the GPU for that;
- `compile_seconds`: what the first steps took beyond later ones; what a method before it compiled is there already, and
  PyTorch also keeps some on disk.

`baseline`, `irm`, `dgd` and `qvit` have soft teacher logits instead of the paper's hard labels; `ours` is what the recipe says.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import METHODS, PAPER_METHODS, SOFT, TITLES, model_overrides, public, write_random_images
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qvit.cli.show import show_table
from qvit.errors import QvitError, TrainingError
from qvit.report_file import write_report
from qvit.training.data import EpochSampler
from qvit.training.device_data import DeviceLoader
from qvit.training.engine import open_loop
from qvit.training.loop import TrainingLoop
from qvit.training.pixels import PixelStore
from qvit.training.recipe import Recipe

# All with soft teacher logits, which are what is worth training with; which loss it is costs next to nothing.
CASES = {name: [*changes, *SOFT] if name in PAPER_METHODS else changes for name, changes in METHODS.items()}
NAMES = TITLES | {"images": "images alone"}
KERNELS = 40  # lines of a profile
STEPS_PROFILED = 3


@dataclass
class Case:
    """One method under measurement.

    Attributes:
        name: of the method.
        loop: that trains it.
        images, labels: of every step.
        resident: bytes that stay between two steps.
        peak, reserved: bytes at the worst moment.
        warm_seconds: of the first steps.
        seconds: of a step, one number a round.
        ratios: float's seconds over its own, one number a round.
    """

    name: str
    loop: TrainingLoop
    images: torch.Tensor
    labels: torch.Tensor
    resident: int = 0
    peak: int = 0
    reserved: int = 0
    warm_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def run(self, steps: int) -> float:
        """Seconds of so many steps."""
        _wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.loop.train_step(self.images, self.labels)
        _wait()
        return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory() -> tuple[int, int]:
    """Bytes of tensors, and bytes that PyTorch holds."""
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if torch.cuda.is_available() else (0, 0)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = _options(arguments)
    base = ["data.workers=0", f"batch_size={options.batch}", f"quant.bits={options.bits}", f"precision={options.precision}"]
    base += [
        *model_overrides(options.model, options.model_args),
        "model.checkpoint=null",
        "log_every=1000000",
        "needs_gpu=false",
    ]
    rows: dict[str, dict[str, Any]] = {}
    profiles: list[str] = []

    def write() -> None:
        if options.json:
            write_report(options.json, list(rows.values()), ["python", "benchmarks/train_step.py", *public(options.command)])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_random_images(folder / "images", Recipe.load(options.recipe, base), max(options.batch, 64))
        base += [f"data.train={source}", f"data.val={source}", "data.cache=device"]
        peer = None
        for method in sorted(options.methods, key=lambda method: method != "float"):
            recipe = Recipe.load(options.recipe, [*base, *CASES[method], *options.set])
            with ExitStack() as stack:
                try:
                    case = _start(method, recipe, folder / method, options.warmup, stack)
                    _rounds(case, peer, options)
                except (torch.OutOfMemoryError, TrainingError) as error:
                    case, message = None, " ".join(str(error).split())
                    print(f"{NAMES[method]}: {message}", file=sys.stderr, flush=True)
                    rows[method] = {**_facts(method, recipe, options), "error": message}
                if case is not None:
                    rows[method] = _row(case, options)
                    if peer is not None:
                        rows["float"] = _row(peer, options)
                    if options.profile:
                        profiles.append(_profile(case))
                    if "images" not in rows:
                        rows["images"] = _images_alone(case.loop, options)
                    if method == "float":
                        peer = case
                        peer_stack = stack.pop_all()
                write()
                case = None
            _make_room()
        if peer is not None:
            peer_stack.close()
        if "images" in rows:
            rows["images"] = rows.pop("images")  # the last row
        write()
        if options.profile:
            options.profile.write_text("\n\n".join(profiles) + "\n")
    _show(list(rows.values()), options)
    return list(rows.values())


def _make_room() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _start(method: str, recipe: Recipe, folder: Path, warmup: int, stack: ExitStack) -> Case:
    """The method ready for timing, and out of memory again when the stack is closed."""
    before = _memory()
    loop = open_loop(recipe, folder, progress=False)
    stack.callback(loop.backward.clear)
    images, labels = next(iter(loop.loader))
    loop.loader = loop.val_loader = ()  # their images are no part of a step
    stack.enter_context(loop.stepping())
    case = Case(method, loop, images, labels)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    case.warm_seconds = case.run(warmup)
    if torch.cuda.is_available():
        case.peak = torch.cuda.max_memory_allocated() - before[0]
        case.reserved = torch.cuda.max_memory_reserved() - before[1]
    case.resident = _memory()[0] - before[0]
    print(f"{NAMES[method]}: {warmup} steps in {case.warm_seconds:.1f} s, compiling included", file=sys.stderr, flush=True)
    return case


def _rounds(case: Case, peer: Case | None, options: argparse.Namespace) -> None:
    for _ in range(options.rounds):
        if peer is not None:
            peer.seconds.append(peer.run(options.steps) / options.steps)
        before = _memory()[0]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        case.seconds.append(case.run(options.steps) / options.steps)
        if torch.cuda.is_available():
            # Float's model lies in memory as well: it does not count.
            case.peak = max(case.peak, torch.cuda.max_memory_allocated() - before + case.resident)
        if peer is not None:
            case.ratios.append(peer.seconds[-1] / case.seconds[-1])


def _images_alone(loop: TrainingLoop, options: argparse.Namespace) -> dict[str, Any]:
    """Images a second from the device's own store, without a training step."""
    preprocessing, batch = loop.setup.preprocessing, options.batch
    count = 4 * batch
    pixels = torch.randint(0, 256, (count, *preprocessing.input_size), dtype=torch.uint8, device=loop.device)
    store = PixelStore(pixels, torch.zeros(count, dtype=torch.int64, device=loop.device))
    sampler = EpochSampler(count, batch, 0)
    loader = DeviceLoader(store, sampler, loop.recipe.data, preprocessing, batch, 0)
    seconds = []
    for epoch in range(options.rounds + 1):
        sampler.start(epoch)
        _wait()
        start = time.perf_counter()
        for _ in loader:
            pass
        _wait()
        seconds.append(time.perf_counter() - start)
    rate = count / statistics.median(seconds[1:])
    return {**_facts("images", loop.recipe, options), "train_images_per_s": rate}


def _facts(method: str, recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    quantized = recipe.quantized and method != "images"
    q = recipe.quant
    return {
        "model": recipe.model.name if recipe.model else None,
        "data": "random images",
        "method": method,
        "weight_bits": (q.weight_bits or q.bits) if quantized else 32,
        "act_bits": (q.act_bits or q.bits) if quantized else 32,
        "seed": recipe.seed,
        "batch": recipe.batch_size,
        "precision": recipe.precision,
        "recipe": options.recipe,
        "overrides": " ".join(public([*CASES.get(method, []), *options.set])),
    }


def _row(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    ms = 1000 * np.array(case.seconds)
    row = _facts(case.name, case.loop.recipe, options)
    rate = 1000 * options.batch / float(np.median(ms))
    row |= {
        "ms_median": float(np.median(ms)),
        "ms_p10": float(np.quantile(ms, 0.1)),
        "ms_p90": float(np.quantile(ms, 0.9)),
        "rounds": len(ms),
        "steps_a_round": options.steps,
        "train_images_per_s": rate,
        "compile_seconds": max(case.warm_seconds - options.warmup * float(np.median(ms)) / 1000, 0.0),
    }
    if torch.cuda.is_available():
        row |= {"peak_gb": case.peak / 1e9, "reserved_gb": case.reserved / 1e9}
    if case.ratios:
        row |= {"peer": "float fine-tuning", "ratio_to_peer": statistics.median(case.ratios)}
    return row


def _profile(case: Case) -> str:
    """The kernels of a few steps (on a CPU, the operators) by the time they took."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as record:
        seconds = case.run(STEPS_PROFILED)
    device = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [e for e in record.key_averages() if e.device_type == device and not getattr(e, "is_user_annotation", False)]
    times = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000 / STEPS_PROFILED for e in events}
    calls = {e.key: e.count / STEPS_PROFILED for e in events}
    total = sum(times.values())
    lines = [
        f"{NAMES[case.name]}, {len(case.images)} images a step: {1000 * seconds / STEPS_PROFILED:.2f} ms a step under the "
        f"profiler, {total:.2f} ms of them in {'kernels' if gpu else 'operators'}",
        "  ms a step   share    calls  kernel" if gpu else "  ms a step   share    calls  operator",
    ]
    for name in sorted(times, key=times.__getitem__, reverse=True)[:KERNELS]:
        share = times[name] / total if total else 0.0
        lines.append(f"{times[name]:11.3f}  {share:6.1%}  {calls[name]:7.1f}  {' '.join(name.split())[:160]}")
    return "\n".join(lines)


def _show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    def number(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    lines = [
        (
            NAMES[row["method"]],
            number(row, "train_images_per_s", ",.0f") or row.get("error", ""),
            number(row, "ms_median", ".2f") if "rounds" in row else "",
            number(row, "ratio_to_peer", ".3f"),
            number(row, "peak_gb", ".1f"),
            number(row, "reserved_gb", ".1f"),
            number(row, "compile_seconds", ".0f"),
        )
        for row in rows
    ]
    title = f"Training steps at {options.bits} bits, {options.batch} images each"
    show_table(title, ("method", "images/s", "ms a step", "of float's", "peak GB", "reserved GB", "compiling, s"), lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="imagenette", help="name or path of the recipe that all methods start from")
    parser.add_argument("--model", help="timm's name of another model than the recipe's")
    parser.add_argument("--model-args", help="its arguments, as YAML: '{patch_size: 14, num_classes: 10}'")
    parser.add_argument("--batch", type=int, default=256, help="images a step")
    parser.add_argument("--bits", type=int, default=2, help="of weights and activations")
    parser.add_argument("--methods", default="float,baseline,irm,dgd,qvit,ours", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--set", action="append", default=[], help="key=value that changes every method's recipe")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each method takes")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--warmup", type=int, default=6, help="steps before the first turn")
    parser.add_argument("--profile", type=Path, help="write the kernels of each method's step to this file")
    parser.add_argument("--json", type=Path, help="result file to write")
    options = parser.parse_args(arguments)
    options.command = sys.argv[1:] if arguments is None else arguments
    options.methods = options.methods.split(",")
    if unknown := [name for name in options.methods if name not in CASES]:
        parser.error(f"there is no method {unknown[0]!r}: name some of {', '.join(CASES)}")
    for name in ("batch", "rounds", "steps", "warmup"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


if __name__ == "__main__":
    try:
        main()
    except QvitError as error:
        sys.exit(f"error: {error}")
