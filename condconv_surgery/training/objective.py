"""What is minimised: labels, a teacher, and how the experts are used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.distillation import Teacher
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.gate_regularization import GateRecorder, balance_loss, sharpness_loss
from condconv_surgery.training.logits import Logits

AUXILIARY_WEIGHT = 0.3
"""Of each auxiliary head's loss, as GoogLeNet was trained."""


def classification_loss(
    logits: Logits, target: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the batch, plus 0.3 times that of each auxiliary head.

    ``target``: labels [B] int64, or shares of the classes [B, K]. ``class_weights`` [K].
    """

    def one(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores.float(), target, weight=class_weights, label_smoothing=smoothing)

    loss = one(logits.main)
    for extra in logits.auxiliary:
        loss = loss + AUXILIARY_WEIGHT * one(extra)
    return loss


class Objective:
    """The loss of a batch right after the model has seen it.

    (1 - w) CE + w T^2 KL + f features + b (log E - H(mean gate)) + s H(gate)
    """

    def __init__(
        self, model: nn.Module, options: TrainingOptions, class_weights: Tensor | None, teacher: Teacher | None
    ) -> None:
        self.options, self.teacher, self.class_weights = options, teacher, class_weights
        layers = options.layers
        self.gates = GateRecorder(model) if layers.balance or layers.sharpness else None
        self.slice_weight: Tensor | None = None

    def prepare(self, labels: Sequence[Tensor], world: World) -> None:
        """Before a step, of whose slices this process has ``labels``: what the classes in a slice weigh on average.

        A weighted mean divides by the weights in it. Those of unlike slices do not average to that of their union;
        divided by the same number, they do, however many processes and parts share the step.
        """
        if self.class_weights is not None:
            weights = [self.class_weights[of.to(self.class_weights.device, non_blocking=True)].sum() for of in labels]
            weight = torch.stack(weights).double().sum()
            total, slices = world.sum_(torch.stack([weight, torch.full_like(weight, len(labels))]))
            self.slice_weight = (total / slices).float()

    def __call__(self, logits: Logits, images: Tensor, target: Tensor) -> Tensor:
        loss = classification_loss(logits, target, self.options.optimizer.label_smoothing, self.class_weights)
        if (
            self.class_weights is not None and self.slice_weight is not None and target.dim() == 1
        ):  # of shares it is a plain mean
            loss = loss * (self.class_weights[target].sum() / self.slice_weight)
        if self.teacher is not None:
            distill = self.options.distill
            on_logits, on_features = self.teacher.loss(images, logits.main)
            loss = (1 - distill.weight) * loss + distill.weight * on_logits + distill.feature_weight * on_features
        return loss + self._on_gates() if self.gates is not None else loss

    def close(self) -> None:
        """Remove every hook."""
        if self.gates is not None:
            self.gates.close()
        if self.teacher is not None:
            self.teacher.close()

    def _on_gates(self) -> Tensor | float:
        assert self.gates is not None
        found = list(self.gates.take().values())
        if not found:
            return 0.0
        layers = self.options.layers
        terms = [layers.balance * balance_loss(gate) + layers.sharpness * sharpness_loss(gate) for gate in found]
        return torch.stack(terms).mean()


def balanced_weights(counts: list[int]) -> Tensor:
    """Weights [K] by which each class counts alike however many images it has: ``N / (K count)``."""
    numbers = torch.tensor(counts, dtype=torch.float32)
    return numbers.sum() / (len(counts) * numbers.clamp_min(1))
