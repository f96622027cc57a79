"""``condconv report``: parameters, MACs, memory, latency and routing statistics of one or several models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from condconv_surgery.errors import InputError, unknown_name

from .export_layout import TARGETS
from .model_to_run import load_to_run, own_split, require_precision, run_of
from .output.console import print_json, say
from .rule_options import is_typed

if TYPE_CHECKING:
    from torch import nn

    from condconv_surgery.deploy.round_experts import Rounded
    from condconv_surgery.reporting import Comparison, Report

DTYPES = ("float32", "bfloat16", "float16", "float64")

OF_MODELS = (
    *("data", "limit", "latency", "batch", "device", "dtype", "round_experts", "original", "html", "plots"),
    *("as_csv", "as_markdown"),
)
"""Options that say nothing of an exported file."""


def report(
    ctx: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            help="A file, a run directory, torchvision:NAME, timm:NAME, pkg.mod:factory. Several: side by side."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Images for accuracy and gates, as finetune reads them, or a run's folder: its validation images."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Largest number of images, equally many of each class.")] = 1000,
    latency: Annotated[
        bool | None,
        typer.Option(
            "--latency/--no-latency", help="Also measure latency, alternating with the original. Default: for --html."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Second batch size for memory and latency, beside 1.")] = 8,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Only the latency of the exported file and its original's, in turns, at batch 1 and 32 where the "
            f"runtime takes both: {', '.join(TARGETS)}."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help=f"Of weights and input: {', '.join(DTYPES)}. Default: that of the file.")
    ] = None,
    round_experts: Annotated[
        str | None, typer.Option(help="Hold experts in int8 or bfloat16, as when serving (cs.round_experts).")
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="The model before conversion, for the distance that experts moved.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture of a bare state_dict: torchvision:NAME.")] = None,
    weights: Annotated[str, typer.Option(help="default, none, or a FILE, for a model by name.")] = "default",
    input_size: Annotated[int | None, typer.Option(help="Side of the image in pixels, if not the model's own.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose code may build it; repeatable.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write the plots into this folder, as PNG and SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line per layer (or per model).")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Report what conversion added per layer, what the model costs to run, and what the routing does."""
    if as_json + as_csv + as_markdown > 1:
        raise InputError("Several of --json, --csv and --markdown.", "stdout has one form.", "one of them")
    if batch < 1 or limit < 1:
        raise InputError(f"--batch {batch}, --limit {limit}.", "Both must be at least 1.", "--batch 8 --limit 1000")
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES, "--dtype bfloat16")
    precision = require_precision(round_experts)
    _require_writable(html, plots)
    if runtime is not None:
        if runtime not in TARGETS:
            raise unknown_name("runtime", runtime, TARGETS, "--runtime onnx")
        _require_only_latency(ctx)

    def load(spec: str, precision: Rounded | None = precision) -> nn.Module:
        return load_to_run(spec, arch, weights, input_size, tuple(trust or ()), device, dtype, precision)

    if runtime is not None:
        _report_files(models, load, runtime, as_json)
        return
    before = load(original, None) if original is not None else None
    result = _measure(models, load, before, data, limit, batch, html is not None if latency is None else latency)
    try:
        if as_json:
            print_json(result.to_dict())
        elif as_csv:
            print(result.to_csv(), end="")
        elif as_markdown:
            print(result.to_markdown(), end="")
        else:
            result.print()
    finally:  # also when nothing can be printed
        _write(result, html, plots)


def _report_files(models: list[str], load: Callable[[str], nn.Module], runtime: str, as_json: bool) -> None:
    """Print the latency of each model's file for ``runtime``."""
    from dataclasses import asdict

    from condconv_surgery.deploy.export_model import runtime_named
    from condconv_surgery.deploy.file_latency import file_latency

    runtime_named(runtime).require_packages()
    rows = {}
    for spec in models:
        say(f"Exporting {spec} and its static original, then timing both files in {runtime}")
        rows[spec] = file_latency(load(spec).cpu().float(), to=runtime)
    if as_json:
        print_json({spec: [asdict(row) for row in measured] for spec, measured in rows.items()})
        return
    for spec, measured in rows.items():
        print(spec)
        for row in measured:
            times = f"{row.median * 1e3:.1f} ms, original {row.original * 1e3:.1f} ms, ratio {row.ratio:.2f}"
            print(f"  batch {row.batch:<3}  {times} (spread {row.spread * 1e3:.1f} ms, {row.repeats} calls)")
        forms = ", ".join(f"{count} as {name}" for name, count in measured[0].forms.items())
        print(f"  layers     {forms}; {measured[0].threads} threads")


def _require_only_latency(ctx: typer.Context) -> None:
    """Raise ``InputError`` for an option that ``--runtime`` would ignore."""
    ignored = [f"--{name.removeprefix('as_').replace('_', '-')}" for name in OF_MODELS if is_typed(name, ctx)]
    if ignored:
        raise InputError(
            f"{', '.join(ignored)} with --runtime.",
            "It prints only the latency of exported files, in float32 on the CPU, as text or --json.",
            "two commands, one with --runtime NAME alone",
        )


def _require_writable(html: Path | None, plots: Path | None) -> None:
    """Raise ``InputError`` before any work for an output that cannot be written."""
    import os

    if html is not None and (html.is_dir() or not html.parent.is_dir() or not os.access(html.parent, os.W_OK)):
        raise InputError(
            f"--html {html} could not be written.", "It is a file in a writable folder.", "--html report.html"
        )
    if plots is not None:
        exists = next(path for path in (plots.absolute(), *plots.absolute().parents) if path.exists())
        if not exists.is_dir() or not os.access(exists, os.W_OK):
            raise InputError(f"--plots {plots} cannot be made in {exists}.", "Plots go into a folder.", "--plots DIR")


def _measure(
    models: list[str],
    load: Callable[[str], nn.Module],
    original: nn.Module | None,
    data: str | None,
    limit: int,
    batch: int,
    latency: bool,
) -> Report | Comparison:
    from dataclasses import replace

    from condconv_surgery.reporting import Comparison, recorded_accuracy
    from condconv_surgery.reporting import report as measure

    reports = []
    for spec in models:
        model = load(spec)
        say(f"Measuring {spec}")
        result = measure(
            model,
            data=None if data is None else own_split(data, spec),
            limit=limit,
            batch=batch,
            latency=latency,
            original=original,
            recorded=recorded_accuracy(spec),
        )
        result = replace(result, provenance=result.provenance.of_command(_typed(), spec)).of_run(run_of(spec))
        reports.append(result if len(models) == 1 else replace(result, title=spec))
    return reports[0] if len(reports) == 1 else Comparison(tuple(reports))


def _typed() -> str:
    """The command as it was typed, quoted for a shell."""
    import shlex
    import sys

    return shlex.join(["condconv", *sys.argv[1:]])


def _write(result: Report | Comparison, html: Path | None, plots: Path | None) -> None:
    from condconv_surgery.reporting import write_page

    if html is not None:
        write_page(result, html)
        say(f"Wrote {html}")
    if plots is not None:
        for path in result.write_plots(plots):
            say(f"Wrote {path}")
