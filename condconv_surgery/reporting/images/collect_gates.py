"""Run labelled images through a model and collect its gates and predictions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers.find_layers import router_hooks
from condconv_surgery.models.classifier_logits import logits_of
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.runtime.modes import device_of, dtype_of, in_mode


@dataclass(frozen=True)
class CollectedGates:
    """The gates and predictions of one pass over N labelled images.

    gates: for each router with several experts, by the name of its layer or block, [N, E]; a softmax row sums to 1, a
        sigmoid row need not. For a router that is called several times: the mean over its calls.
    means: for each router the mean mixture, batch 1.
    scales: for each layer with attention its mixture, a row for each image.
    labels: [N]. outputs: the predictions, [N].
    """

    gates: dict[str, Tensor]
    means: dict[str, Mixture]
    scales: dict[str, Mixture]
    labels: Tensor
    outputs: Outputs


class Outputs(NamedTuple):
    """The index of the largest of ``width`` logits for N images, and its softmax probability: [N] each."""

    predicted: Tensor
    confidence: Tensor
    width: int


def collect_gates(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> CollectedGates:
    """Run labelled images through ``model`` in eval mode and collect every mixture.

    Raises ``InputError`` when a logit is not finite, or the model is not a classifier.
    """
    recorded: dict[str, list[Mixture]] = {}

    def record(name: str, router: nn.Module, inputs: Any, mixture: Mixture) -> None:
        recorded.setdefault(name, []).append(Mixture(*(None if t is None else t.float().cpu() for t in mixture)))

    with in_mode(model, training=False), torch.inference_mode(), router_hooks(model, record):
        labels, outputs = _run(model, batches)
    joined = {name: _joined(mixtures, len(labels)) for name, mixtures in recorded.items()}
    gates = {n: m.gate for n, m in joined.items() if m.gate is not None and m.gate.shape[1] > 1}
    means = {name: _mean(mixture) for name, mixture in joined.items()}
    scales = {name: mixture for name, mixture in joined.items() if any(part is not None for part in mixture[1:])}
    return CollectedGates(gates, means, scales, labels, outputs)


def predict_batches(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Outputs]:
    """The labels [N] and the predictions of ``model`` in eval mode. Raises as ``collect_gates``."""
    with in_mode(model, training=False), torch.inference_mode():
        return _run(model, batches)


def outputs_with_mean_gates(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], means: dict[str, Mixture]
) -> Outputs:
    """The predictions with every mixture replaced by its mean: the network without routing."""

    def replace(name: str, router: nn.Module, inputs: Any, mixture: Mixture) -> Mixture | None:
        return means[name].for_images_of(mixture) if name in means else None

    with in_mode(model, training=False), torch.inference_mode(), router_hooks(model, replace):
        return _run(model, batches)[1]


def _run(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Outputs]:
    """The labels [N] and the predictions."""
    labels, predicted, confidence, width = [], [], [], 0
    device = device_of(model)
    for images, targets in batches:
        logits = logits_of(model(images.to(device, dtype_of(model)))).main.float()
        width = logits.shape[1]
        if not bool(torch.isfinite(logits).all()):
            raise InputError(
                "The model's outputs on the images are not finite.",
                "Routing can only be measured on a model with finite outputs.",
                "an artifact from before training diverged, or dtype=float32",
            )
        labels.append(targets)
        predicted.append(logits.argmax(dim=1).cpu())
        confidence.append(logits.softmax(dim=1).amax(dim=1).cpu())
    return torch.cat(labels), Outputs(torch.cat(predicted), torch.cat(confidence), width)


def _joined(mixtures: list[Mixture], images: int) -> Mixture:
    """One row per image. A layer that is called several times has consecutive mixtures per batch: take their mean."""
    calls = sum(next(p for p in m if p is not None).shape[0] for m in mixtures) // images
    per_batch = [mixtures[i : i + calls] for i in range(0, len(mixtures), calls)]

    def join(part: int) -> Tensor | None:
        rows = [[m[part] for m in batch] for batch in per_batch]
        return None if rows[0][0] is None else torch.cat([torch.stack(list(row)).mean(dim=0) for row in rows])  # type: ignore[arg-type]

    return Mixture(join(0), join(1), join(2), join(3))


def _mean(mixture: Mixture) -> Mixture:
    return Mixture(*(None if part is None else part.mean(dim=0, keepdim=True) for part in mixture))
