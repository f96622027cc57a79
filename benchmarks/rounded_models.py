"""Networks whose experts are held in bfloat16 or int8: time and memory at batch 1, over the static network.

``python -m benchmarks.rounded_models [--batch B] [--models ...]`` prints a line for each network and variant.
"""

from __future__ import annotations

import argparse

import torch
import torchvision
from torch import nn

from benchmarks.model_times import converted
from benchmarks.protocol import Measurement, Protocol
from condconv_surgery.deploy import round_experts
from condconv_surgery.recipe import CondConv, ODConv, Variant

MODELS = ("mobilenet_v2", "efficientnet_b0", "resnet18", "resnet50")
VARIANTS: dict[str, Variant] = {
    "condconv4": CondConv(experts=4),
    "condconv8": CondConv(experts=8),
    "odconv4": ODConv(experts=4),
}
SECONDS = 0.2
"""For which a contender runs in a turn."""


def contenders(name: str, variant: Variant) -> dict[str, nn.Module]:
    """The static network, and its conversion with the experts in each precision."""
    static = torchvision.models.get_model(name, weights=None).eval()
    exact = converted(static, variant).eval()
    rounded = {precision: round_experts(exact, precision).model for precision in ("bfloat16", "int8")}
    return {"static": static, "float32": exact, **rounded}


def measure(models: dict[str, nn.Module], batch: int, pixels: int, protocol: Protocol) -> Measurement:
    """The forward pass of each, in turns."""
    x = torch.randn(batch, 3, pixels, pixels)
    with torch.inference_mode():
        return protocol.measure({name: lambda model=model: model(x) for name, model in models.items()}, SECONDS)


def megabytes(model: nn.Module) -> float:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounded_models", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    protocol = Protocol(options.repeats, options.threads)
    for name in options.models:
        for label, variant in VARIANTS.items():
            models = contenders(name, variant)
            found = measure(models, options.batch, options.pixels, protocol)
            of = [f"{who} {found.ratios[who]} {megabytes(model):.1f} MB" for who, model in models.items()]
            print(f"{name:16} {label:10} static {found.seconds['static'].median * 1e3:.1f} ms; " + "; ".join(of[1:]))


if __name__ == "__main__":
    main()
