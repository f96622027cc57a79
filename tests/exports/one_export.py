"""One network, one variant, one runtime: convert, scramble, export, compare. What came of it is a ``Row``."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.deploy.export_model import RUNTIMES
from condconv_surgery.layers import conditional_layers, routers
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant

NETWORKS = ("mobilenet_v3_small", "resnet18", "mobilenet_v2", "efficientnet_b0", "resnet50")

VARIANTS: dict[str, Variant] = {
    "CondConv 4": CondConv(4),
    "DynamicConv 4": DynamicConv(4),
    "ODConv 1": ODConv(1),
    "ODConv 4": ODConv(4),
    "ODConv 1, no spatial": ODConv(1, spatial=False),
}

CONSTANT_KERNELS = ("litert", "ncnn")
"""Runtimes that are tried with the variants of the forms ``scale`` and ``sum``."""

SIDE = 64

MAX_RATIO = 1.05
"""Of a file's bytes to those of the converted model's weights, without what its graph may take."""

GRAPH_BYTES = {"pt2": 2**21}
"""A ``.pt2`` writes its graph as text: some thousand operators at a kilobyte each, for a small network too."""


@dataclass(frozen=True)
class Row:
    """What came of one export.

    forms: how many layers have each. ratio: bytes of the file over those of the converted model's weights.
    difference: the largest to the model, relative to its largest output, over ``inputs``. failure: what went wrong.
    """

    network: str
    variant: str
    runtime: str
    forms: dict[str, int]
    megabytes: float = 0.0
    ratio: float = 0.0
    difference: float = 0.0
    inputs: int = 0
    seconds: float = 0.0
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_export(network: str, variant: str, runtime: str) -> Row:
    """Export in the runtime's own choice of forms, for any batch and size where it has them."""
    torch.manual_seed(0)
    begin = time.process_time()
    model, own = trained_alike(network, VARIANTS[variant]), RUNTIMES[runtime]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{own.suffix}")
        try:
            result = cs.export(model, path, to=runtime, size=SIDE, dynamic_size=not own.fixed_size)
        except cs.SurgeryError as error:
            return Row(network, variant, runtime, {}, failure=str(error).splitlines()[0])
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    forms = dict(Counter(result.forms.values()))
    allowed = MAX_RATIO * weights + GRAPH_BYTES.get(runtime, 0)
    failure = f"the file has {size / weights:.3f} of the weights' bytes" if size > allowed else ""
    seconds = time.process_time() - begin
    megabytes, inputs = size / 1e6, len(result.shapes)
    return Row(
        network,
        variant,
        runtime,
        forms,
        megabytes,
        size / weights,
        result.difference,
        inputs,
        seconds,
        failure,
    )


def trained_alike(network: str, variant: Variant) -> nn.Module:
    """A converted network whose routers, experts and running statistics are not those of its start.

    Norms take the statistics of noise, and logits vary a little: other random networks of this depth
    amplify rounding a millionfold.
    """
    plain = torchvision.models.get_model(network, weights=None).eval()
    images = torch.randn(16, 3, SIDE, SIDE)
    model = cs.convert(plain, variant, example=images[:2], prove=False, inplace=True).model
    vary(model)
    settle(model, [images, torch.randn(16, 3, SIDE + 32, SIDE + 64)])
    return model.eval()


@torch.no_grad()
def vary(model: nn.Module) -> None:
    """Random routers, and experts that differ by a tenth of their deviation."""
    for layer in conditional_layers(model).values():
        noise = torch.randn_like(layer.weight)
        layer.weight.add_((noise - noise.mean(0)) * layer.weight.std() * 0.1)
    for router in routers(model).values():
        for module in router.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
            if isinstance(module, nn.Linear):
                module.weight.copy_(torch.randn_like(module.weight) * 0.3 / module.in_features**0.5)
                if module.bias is not None:
                    module.bias.copy_(torch.randn_like(module.bias) * 0.5)


@torch.no_grad()
def settle(model: nn.Module, batches: list[Tensor]) -> None:
    """Norms of maps take the statistics of ``batches``. Those of routers do not: pooled features of a random network
    hardly vary, and to divide by that deviation would amplify rounding."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average
        norm.reset_running_stats()
        norm.train()
    for images in batches:
        model(images)
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_var is not None
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))  # a channel that is nearly constant
