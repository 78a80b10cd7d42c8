"""``qvit report``: one page that shows what quantization does to a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qvit.cli import options
from qvit.cli.images import at_least_one, device_of
from qvit.cli.results import write_results
from qvit.cli.show import count, show_facts
from qvit.errors import InputError
from qvit.files import write_atomically


def command(
    run: Annotated[Path, typer.Argument(help="The folder of a quantized run, a quantized checkpoint, or a .qvit file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .html file to write.")],
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="A second run, checkpoint or file to show beside it.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="The float model to compare with; by default the one of the run's recipe.")
    ] = None,
    data: options.OptionalEvaluationData = None,
    images: Annotated[int, typer.Option("--images", help="Images that statistics are taken on, evenly spaced.")] = 128,
    maps: Annotated[int, typer.Option("--maps", help="Images whose attention maps are shown.")] = 4,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results", help="A result file (--json of any command) for accuracy, size, latency; may be given again."
        ),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Measure the cpu engine on one image, on this machine.")] = False,
    batch: options.Batch = 32,
    workers: options.Workers = None,
    device: options.Device = None,
    threads: options.Threads = None,
    json: options.Json = None,
) -> None:
    """Show what quantization does to a model, on one self-contained page.

    Queries and keys before and after IRM, the entropy of their codes, how far attention reaches, where the class token looks,
    similarities against the teacher's, which part costs accuracy, training curves, accuracy against size and latency. What
    cannot be shown is left out, and the page says why. See docs/report.md.

    Example:

        qvit report runs/deit_small_w2a2 --baseline runs/deit_small_w2a2_baseline -o report.html
    """
    if output.suffix != ".html":
        raise InputError(f"{output} is no .html file: end its name with .html.")
    at_least_one("--images", images)
    at_least_one("--maps", maps)

    from qvit.analyze.report.page import render
    from qvit.analyze.report.rows import histograms
    from qvit.cli.report_inputs import open_quantized
    from qvit.cli.report_parts import Report
    from qvit.report_file import hardware, read_report, report_of, versions

    rows_of_files = [(path, read_report(path)) for path in results or []]
    student = open_quantized(run)
    other = open_quantized(baseline) if baseline is not None else None
    report = Report(student, other, device_of(device))
    report.open_teacher(teacher)
    report.open_images(data, images, maps, batch, workers)
    report.add_results(rows_of_files, latency, threads)
    report.add_training()
    report.add_attention()
    report.add_sensitivity()
    if all(section.empty for section in report.sections):
        raise InputError(
            f"There is nothing to report on {run}: it holds no log and no accuracy, and there are no images; name images with "
            "--data, or the folder of the run."
        )
    command_line = ["qvit", *sys.argv[1:]]
    numbers = {**report_of(report.rows, command_line), "histograms": histograms(report.statistics)}
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    machine = hardware()
    made = f"On {machine.get('gpu') or machine['cpu']}, {machine['cores']} cores, with {made}."
    page = render(report.heading, report.facts, report.sections, numbers, made)
    write_atomically(output, page.encode())
    missing = [sentence for section in report.sections for sentence in section.missing]
    show_facts(
        {
            "report": f"{output}, {count(len(page.encode()))} bytes",
            "figures": ", ".join(section.title for section in report.sections if not section.empty),
            **{f"note {number}": sentence for number, sentence in enumerate(dict.fromkeys(missing), 1)},
        }
    )
    write_results(json, report.rows)
