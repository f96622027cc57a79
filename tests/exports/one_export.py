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
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.variant_cases import scramble

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
    seconds = time.process_time() - begin
    return Row(
        network, variant, runtime, forms, size / 1e6, size / weights, result.difference, len(result.shapes), seconds
    )


def trained_alike(network: str, variant: Variant) -> nn.Module:
    """A converted network whose routers, experts and running statistics are not those of its start.

    Its batch norms take the statistics of noise: with those that they start with, a deep network amplifies rounding.
    """
    plain = torchvision.models.get_model(network, weights=None).eval()
    images = torch.randn(16, 3, SIDE, SIDE)
    model = cs.convert(plain, variant, example=images[:2], prove=False, inplace=True).model
    scramble(model)
    settle(model, images)
    return model.eval()


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Batch norms take the statistics of ``images``; those of routers keep theirs."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average
        norm.reset_running_stats()
        norm.train()
    model(images)
    for norm in norms:
        norm.momentum = 0.1
