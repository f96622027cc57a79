"""Whole models at 224 px: converted against static, and against other implementations of the convolution."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.contenders import SampleLoop
from benchmarks.protocol import Measurement, Protocol
from benchmarks.setting import USUAL, Setting
from benchmarks.timing import interleaved
from condconv_surgery import native
from condconv_surgery.layers import conditional_layers
from condconv_surgery.recipe import Variant
from condconv_surgery.surgery import convert

OTHERS = ("grouped", "loop")  # the form of timm and of ODConv's authors, and a loop over the batch


@dataclass(frozen=True)
class ModelResult:
    """Times of one model, batch and mode; the ratios are to the static model. floor: see ``roofline``."""

    model: str
    batch: int
    mode: str
    times: Measurement
    floor: dict[str, float]

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def measure_model(
    name: str,
    variants: dict[str, Variant],
    batch: int,
    mode: str,
    protocol: Protocol,
    others: bool,
    pixels: int = 224,
    setting: Setting = USUAL,
) -> ModelResult:
    """The static model and its conversion to each variant, timed in one run."""
    models, steps = _contenders(name, variants, batch, mode, others, pixels, setting)
    at_least = 0.05 if setting.device != "cpu" else 0.2 if batch == 1 else 0.0
    times = protocol.measure(steps, at_least)
    seconds = times.seconds["static"].median
    floor = {v: roofline(models[v], seconds, setting) for v in variants} if batch == 1 and mode == "eval" else {}
    return ModelResult(name, batch, mode, times, floor)


def contender_steps(
    name: str, variants: dict[str, Variant], batch: int, mode: str, pixels: int = 224, setting: Setting = USUAL
) -> dict[str, Callable[[], object]]:
    """What runs in a turn: the static model first, then its conversion to each variant."""
    return _contenders(name, variants, batch, mode, False, pixels, setting)[1]


def _contenders(
    name: str, variants: dict[str, Variant], batch: int, mode: str, others: bool, pixels: int, setting: Setting
) -> tuple[dict[str, nn.Module], dict[str, Callable[[], object]]]:
    """The models, and a step of each. others: also with other implementations of the convolution."""
    x = setting.place(torch.randn(batch, 3, pixels, pixels))
    static = _calibrated(setting.place(torchvision.models.get_model(name, weights=None)), x)
    models: dict[str, nn.Module] = {"static": static}
    for variant_name, variant in variants.items():
        models[variant_name] = converted(static, variant)
        for implementation in OTHERS if others and batch > 1 else ():
            models[f"{variant_name} {implementation}"] = _forced(converted(static, variant), implementation)
    make = _evaluation if mode == "eval" else _training
    return models, {who: make(model, x, setting) for who, model in models.items()}


def converted(static: nn.Module, variant: Variant) -> nn.Module:
    """The converted model, without the proof (the tests run it)."""
    example = torch.randn(2, 3, 64, 64, device=next(static.parameters()).device)
    return convert(static, variant, example=example, prove=False).model


def roofline(model: nn.Module, static_seconds: float, setting: Setting = USUAL) -> float:
    """Lower bound of time / static at batch 1: the static time plus one read of every expert at copy bandwidth."""
    read = sum(layer.weight.numel() * layer.weight.element_size() for layer in conditional_layers(model).values())
    return 1.0 + read / copy_bandwidth(setting) / static_seconds


def copy_bandwidth(setting: Setting = USUAL, size: int = 256 << 20) -> float:
    """Bytes per second read by a copy larger than every cache; its writes are not counted."""
    source, target = (setting.place(torch.ones(size // 4)) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return size / statistics.median(times)


def peak_training_bytes(name: str, variant: str, batch: int, setting: Setting = USUAL) -> int:
    """Peak memory of a training step with SGD and momentum, in its own process: resident, or of tensors on a GPU."""
    command = [sys.executable, "-m", "benchmarks.model_times", name, variant, str(batch), json.dumps(asdict(setting))]
    command += ["native"] if native.is_enabled() else []
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(answer.split()[-1])


def _peak_here(name: str, variant: Variant | None, batch: int, setting: Setting) -> int:
    torch.set_num_threads(1)
    model = torchvision.models.get_model(name, weights=None)
    if variant is not None:
        model = convert(model, variant, example=torch.randn(2, 3, 64, 64), prove=False, inplace=True).model
    model = setting.place(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = setting.place(torch.randn(batch, 3, 224, 224))
    for _ in range(2):
        with setting.precision():
            loss = model.train()(x).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if setting.device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def _calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """Set batch-norm statistics from one batch; with those of a new network activations shrink to 1e-14."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn_like(x[:1].expand(8, -1, -1, -1)))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model


def _forced(model: nn.Module, implementation: str) -> nn.Module:
    for name, layer in conditional_layers(model).items():
        if implementation == "loop":
            model.set_submodule(name, SampleLoop(layer))
        else:
            one_kernel = layer.variant.experts == 1 and layer.geometry.pointwise
            layer.implementation = "static" if one_kernel else implementation
    return model


def _evaluation(model: nn.Module, x: Tensor, setting: Setting) -> Callable[[], object]:
    def step() -> None:
        model.eval()
        with torch.no_grad(), setting.precision():
            model(x)

    return step


def _training(model: nn.Module, x: Tensor, setting: Setting) -> Callable[[], object]:
    def step() -> None:
        with setting.precision():
            loss = model.train()(x).square().mean()
        torch.autograd.backward(loss)
        for parameter in model.parameters():
            parameter.grad = None

    return step


if __name__ == "__main__":
    from benchmarks.layer_times import VARIANTS

    _, model_name, variant_name, batch_size, chosen, *with_native = sys.argv
    native.enable() if with_native else native.disable()
    print(_peak_here(model_name, VARIANTS.get(variant_name), int(batch_size), Setting(**json.loads(chosen))))
