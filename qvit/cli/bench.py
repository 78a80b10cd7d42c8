"""``qvit bench``: an engine beside its peers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.analyze.products import has_mixed_widths
from qvit.cli import options
from qvit.cli.checkpoints import INTEGER_SUFFIX
from qvit.cli.images import at_least_one, device_of
from qvit.cli.results import write_results
from qvit.cli.show import note, progress, show_table
from qvit.cli.spec_options import DEFAULT_BITS
from qvit.engines import gpu_named
from qvit.errors import InputError
from qvit.integer.model import IntegerModel
from qvit.report_file import usable_cores

_BUSY = 0.5  # load average a core


def command(
    model: Annotated[str, typer.Argument(help="A .qvit file, or timm's name of a model, which then gets random weights.")],
    engine: options.Engine = None,
    versus: Annotated[
        str | None,
        typer.Option(
            "--vs",
            help="Peers, or none. On the CPU: openvino, openvino-bf16, onnxruntime, torch, torch-bf16 (slow to start); by "
            "default openvino,onnxruntime. On a GPU: eager (fp32), tf32, eager-bf16, compile, torchao (slow to start); by "
            "default compile,torchao.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Images a call: a number, or several.")] = "1",
    threads: Annotated[
        str | None, typer.Option("--threads", help="On the CPU: a number, or several; one and all by default.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda or cuda:1, ..; the engine's own by default.")
    ] = None,
    floats: Annotated[
        bool, typer.Option("--floats", help="On a GPU: also time the engine with normalised float32 images.")
    ] = False,
    bits: Annotated[
        int | None, typer.Option("--bits", help="Of weights and activations, where the model has random weights; 4 by default.")
    ] = None,
    residual: Annotated[
        str | None,
        typer.Option("--residual", help="Of the residual stream, float32 or float16, where the model has random weights."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Turns of each, a quarter of a second or more.")] = 15,
    json: options.Json = None,
) -> None:
    """Measure the speed and memory of an engine beside its peers.

    Each runs in a process of its own and they take turns, so that whatever else the machine does slows all down alike. Peers
    have the same architecture, random weights and the arithmetic of their name, by default int8 on the CPU. They come with
    'qvit[bench]'; one that is not installed is left out.

    ms: median, 10th and 90th percentile of a call. ratio: how many times faster the engine is, over paired turns. memory: the
    most that the process had resident. start: from nothing to the first answer, files in the page cache.

    On a GPU the images lie there before a call begins, and a call ends when the GPU is done. The engine gets uint8 images, as a
    camera makes them; peers get normalised images of their own type. memory: the most of the GPU's memory that PyTorch's
    allocator had while it was measured. start: kernels that are compiled included.

    Exit status: 0; 2 where the engine cannot be measured; 130 after Ctrl-C.

    Example:

        qvit bench deit_small_w4a4.qvit --vs openvino,onnxruntime --batch 1,8 --threads 1,2

        qvit bench deit_small_patch16_224 --bits 2 --json bench.json

        qvit bench deit_small_w4a4.qvit --engine cuda --vs eager,compile,torchao --batch 1,256
    """
    from qvit.bench.peers import peers_on
    from qvit.bench.run import Settings, compare, make_random_model
    from qvit.engines import default_engine
    from qvit.spec import ModelSpec

    stream = ModelSpec(residual=residual or "float32").residual  # said before anything is made
    cores = usable_cores()
    name = engine or default_engine(device)
    gpu = _gpu(name, device)
    if gpu is None and floats:
        raise InputError("--floats is for an engine on a GPU: on the CPU all get float32 images.")
    if gpu is not None and threads is not None:
        raise InputError(f"--threads is for engines on the CPU, and {name} runs on {gpu}: leave it out.")
    settings = Settings(
        engine=name,
        batches=_numbers("--batch", batch),
        threads=sorted({1, cores}) if threads is None else _numbers("--threads", threads),
        device=gpu,
        float_images=floats,
        rounds=at_least_one("--rounds", rounds),
    )
    wanted = None if versus is None else [part for part in _parts(versus) if part != "none"]
    peers = peers_on("cpu" if gpu is None else "cuda", wanted)
    if gpu is not None:
        device_of(gpu)  # said before anything is made
    file = Path(model)
    if file.suffix == INTEGER_SUFFIX and (bits is not None or residual is not None):
        raise InputError(f"{model} is quantized already: leave out --bits and --residual.")
    with tempfile.TemporaryDirectory(prefix="qvit-bench-") as scratch:
        folder = Path(scratch)
        if file.suffix != INTEGER_SUFFIX:
            file = folder / f"model{INTEGER_SUFFIX}"
            for _ in _progress([None], 1, f"making {model} with random weights"):
                make_random_model(model, DEFAULT_BITS if bits is None else bits, file, stream)
        _warn_if_busy(cores)
        rows = compare(file, peers, settings, folder, _progress, note)
        frozen = IntegerModel.load(file)
    _show(rows, has_mixed_widths(frozen.architecture, frozen.specs))
    write_results(json, rows)


def _gpu(engine: str, device: str | None) -> str | None:
    """The GPU that an engine is measured on; none where it runs on the CPU."""
    if engine == "cuda":
        return gpu_named(device)
    if device in (None, "cpu"):
        return None
    if engine == "cpu":
        raise InputError(f"The engine 'cpu' does not run on the device {device!r}: use --engine cuda, or leave --device out.")
    return device


def _progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    return progress(items, total, what)


def _warn_if_busy(cores: int) -> None:
    """Says so where other programs are running, which makes times long and ratios uncertain."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY * cores:
        note(f"the machine is busy (load {load:.1f} on {cores} cores): measure again when it is idle.")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str) -> list[int]:
    """``1,8`` -> [1, 8], each at least one."""
    try:
        numbers = [int(part) for part in _parts(text)]
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"{option} {text!r} is no list of whole numbers: write it as 1,8.")
    return [at_least_one(option, number) for number in dict.fromkeys(numbers)]


def _show(rows: list[dict[str, Any]], mixed: bool) -> None:
    first = rows[0]
    on_gpu = "threads" not in first
    columns = [
        "batch",
        "images" if on_gpu else "threads",
        "",
        "ms",
        "10 %",
        "90 %",
        "images/s",
        "ratio",
        "memory",
        "start",
        "file",
    ]
    lines = []
    for row in rows:
        own = "peer" not in row
        memory = row.get("gpu_mb" if on_gpu else "rss_mb")
        lines.append(
            (
                row["batch"] if own else "",
                row["input"] if on_gpu else row["threads"] if own else "",
                f"qvit {row['engine']}" if own else row["title"],
                f"{row['ms_median']:.2f}",
                f"{row['ms_p10']:.2f}",
                f"{row['ms_p90']:.2f}",
                f"{row['images_per_s']:.1f}",
                "" if own else f"{row['ratio_to_peer']:.2f}",
                "" if memory is None else f"{memory:.0f} MB",
                f"{row['start_seconds']:.2f} s",
                f"{row['file_bytes'] / 1e6:.1f} MB",
            )
        )
    where = f" on {first['device']}" if "device" in first else ""
    bits = f"W{first['weight_bits']}A{first['act_bits']}" + (" in most layers (mixed)" if mixed else "")
    stream = ", a float16 stream" if first.get("residual") == "float16" else ""
    show_table(f"{first['model']}, {bits}{stream}{where}", columns, lines, left=3)
