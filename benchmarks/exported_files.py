"""Latency of exported files in their runtime against the static network's own file.

    python -m benchmarks.exported_files --threads 2 --runtimes onnx openvino

One row for a runtime, network, variant, form and graph (for any batch, or one image only); the two files in turns,
medians.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.presenting import environment, write_json
from condconv_surgery import SurgeryError, convert
from condconv_surgery.deploy.export_model import RUNTIMES
from condconv_surgery.deploy.file_latency import file_latency
from condconv_surgery.layers import conditional_layers
from condconv_surgery.recipe import CondConv, ODConv, Variant

VARIANTS: dict[str, Variant] = {
    "condconv:4": CondConv(4),
    "odconv:1": ODConv(1),
    "odconv:1,spatial=false": ODConv(1, spatial=False),
    "odconv:4": ODConv(4),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exported_files", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "resnet18"], metavar="NAME")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--runtimes", nargs="+", default=["onnx"], choices=list(RUNTIMES))
    parser.add_argument("--forms", nargs="+", default=["auto"], help="forms to compare: auto, scale, sum, matmul, ...")
    parser.add_argument("--graphs", nargs="+", default=["any", "one"], choices=["any", "one"], help="batches they take")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row and batch")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for one thread, busy machine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exported-files.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    batches = " | ".join(f"batch {batch}" for batch in options.batches)
    print(f"| runtime | network | variant | form | graph | layers | {batches} |")
    print(f"|---|---|---|---|---|---|{'---|' * len(options.batches)}")
    results = []
    for name in options.models:
        for variant in options.variants:
            model = converted(name, VARIANTS[variant])
            for to, form, graph in itertools.product(options.runtimes, options.forms, options.graphs):
                row = {"runtime": to, "model": name, "variant": variant, "form": form, "graph": graph}
                results += _measure(model, row, options)
    content = {"environment": environment(options.threads), "clock": options.clock, "results": results}
    write_json(options.out, content)


def converted(name: str, variant: Variant) -> nn.Module:
    """A torchvision network of random weights, all of its convolutions but the stem converted.

    Its experts differ: of equal ones a runtime computes one.
    """
    model = torchvision.models.get_model(name, weights=None).eval()
    model = convert(model, variant, example=torch.randn(1, 3, 64, 64), prove=False, inplace=True).model.eval()
    for layer in conditional_layers(model).values():
        layer.weight.data.mul_(1 + 0.1 * torch.randn_like(layer.weight))
    return model


def _measure(model: nn.Module, row: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print one line of the table; a form that is not possible says why."""
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    given: dict[str, Any] = {"size": options.pixels, "seconds": options.seconds, "clock": clock}
    batch = 1 if row["graph"] == "one" else None
    line = f"| {' | '.join(row.values())} |"
    try:
        found = file_latency(model, options.batches, to=row["runtime"], form=row["form"], batch=batch, **given)
    except SurgeryError as error:
        print(f"{line} {error.given} |{' |' * len(options.batches)}", flush=True)
        return []
    layers = ", ".join(f"{count} {own}" for own, count in found[0].forms.items())
    ratios = {one.batch: f"{one.ratio:.2f}" for one in found}
    print(f"{line} {layers} | {' | '.join(ratios.get(count, '') for count in options.batches)} |", flush=True)
    return [{**row, **asdict(one)} for one in found]


if __name__ == "__main__":
    main()
