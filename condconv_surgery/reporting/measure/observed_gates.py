"""The gates that a model gave to some pictures, and what the model answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import routers
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.runtime.modes import device_of, in_mode


@dataclass(frozen=True)
class Observed:
    """What one pass over labelled pictures showed.

    gates: for each router of more than one expert, by its layer or block, [N, E]; a row of softmax sums to 1, one of
        sigmoids need not. Of one that is called several times, the mean of its calls.
    means: for each router the mean mixture, batch 1.
    spreads: for each layer with attention, how much its scales differ between pictures (mean standard deviation).
    labels: [N]. right: whether the answer is the label, [N]. width: how many logits there are.
    """

    gates: dict[str, Tensor]
    means: dict[str, Mixture]
    spreads: dict[str, float]
    labels: Tensor
    right: Tensor
    width: int

    @property
    def accuracy(self) -> float:
        """Top-1, 0 to 1."""
        return float(self.right.double().mean())


def observe(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], answers: Tensor | None = None) -> Observed:
    """Run labelled pictures through ``model`` in eval mode and keep every mixture.

    answers: [classes of the folder], the logit that stands for each; by default the label is the logit.
    Raises ``InputError`` when an answer is no number.
    """
    kept: dict[str, list[Mixture]] = {}
    with in_mode(model, training=False), torch.inference_mode(), _listening(model, kept):
        labels, right, width = _answers(model, batches, answers)
    joined = {name: _joined(mixtures, len(labels)) for name, mixtures in kept.items()}
    gates = {n: m.gate for n, m in joined.items() if m.gate is not None and m.gate.shape[1] > 1}
    means = {name: _mean(mixture) for name, mixture in joined.items()}
    spreads = {name: _spread(mixture) for name, mixture in joined.items() if any(p is not None for p in mixture[1:])}
    return Observed(gates, means, spreads, labels, right, width)


def frozen_right(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    means: dict[str, Mixture],
    answers: Tensor | None = None,
) -> Tensor:
    """Which answers are right with every mixture fixed at its mean, [N]: the same network without conditioning."""
    with in_mode(model, training=False), torch.inference_mode(), _frozen(model, means):
        return _answers(model, batches, answers)[1]


def _answers(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], answers: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    labels, right, width = [], [], 0
    device = device_of(model)
    for images, wanted in batches:
        output = model(images.to(device, next(model.parameters()).dtype))
        logits = output if isinstance(output, Tensor) else output[0]
        width = logits.shape[1]
        if not bool(torch.isfinite(logits).all()):
            raise InputError(
                "The model's answers to the pictures are not finite.",
                "Gates are looked at in a model that answers.",
                "an artifact from before training diverged, or --dtype float32",
            )
        labels.append(wanted)
        right.append(logits.argmax(dim=1).cpu() == (wanted if answers is None else answers[wanted]))
    return torch.cat(labels), torch.cat(right), width


@contextmanager
def _listening(model: nn.Module, kept: dict[str, list[Mixture]]) -> Iterator[None]:
    def listener(name: str) -> Any:
        def hear(module: nn.Module, inputs: Any, output: Mixture) -> None:
            kept.setdefault(name, []).append(Mixture(*(None if t is None else t.float().cpu() for t in output)))

        return hear

    hooks = [router.register_forward_hook(listener(name)) for name, router in routers(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _frozen(model: nn.Module, means: dict[str, Mixture]) -> Iterator[None]:
    def replacer(mean: Mixture) -> Any:
        def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Mixture) -> Mixture:
            fixed = (m if t is None or m is None else m.to(t).expand_as(t) for m, t in zip(mean, output, strict=True))
            return Mixture(*fixed)

        return replace

    found = routers(model).items()
    hooks = [router.register_forward_hook(replacer(means[name])) for name, router in found if name in means]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _joined(mixtures: list[Mixture], pictures: int) -> Mixture:
    """One row a picture. A layer called several times has several rows in turn for each batch: their mean."""
    calls = sum(next(p for p in m if p is not None).shape[0] for m in mixtures) // pictures
    per_batch = [mixtures[i : i + calls] for i in range(0, len(mixtures), calls)]

    def join(part: int) -> Tensor | None:
        rows = [[m[part] for m in batch] for batch in per_batch]
        return None if rows[0][0] is None else torch.cat([torch.stack(list(row)).mean(dim=0) for row in rows])  # type: ignore[arg-type]

    return Mixture(join(0), join(1), join(2), join(3))


def _mean(mixture: Mixture) -> Mixture:
    return Mixture(*(None if part is None else part.mean(dim=0, keepdim=True) for part in mixture))


def _spread(mixture: Mixture) -> float:
    parts = [part.flatten(1) for part in mixture[1:] if part is not None]
    return float(torch.cat(parts, dim=1).std(dim=0, correction=0).mean())
