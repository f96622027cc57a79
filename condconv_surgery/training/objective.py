"""The training loss: labels, a teacher, and regularisation of the gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.models.classifier_logits import Logits
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.distillation import Teacher
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.gate_regularization import GateRecorder, balance_loss, sharpness_loss

AUXILIARY_WEIGHT = 0.3
"""Weight of the loss of each auxiliary head, as in the training of GoogLeNet."""


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
    """The loss of a batch, called directly after the forward pass.

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
        """Before a step, whose slices in this process have ``labels``: compute the mean class weight of a slice.

        A weighted mean divides by the sum of the weights in it, so the means of different slices do not average to the
        mean of their union. Divided by the same number they do, for any number of processes and micro-batches.
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
        if self.gates is not None:
            self.gates.close()
        if self.teacher is not None:
            self.teacher.close()

    def _on_gates(self) -> Tensor | float:
        assert self.gates is not None
        gates = list(self.gates.take().values())
        if not gates:
            return 0.0
        layers = self.options.layers
        terms = [layers.balance * balance_loss(gate) + layers.sharpness * sharpness_loss(gate) for gate in gates]
        return torch.stack(terms).mean()


def balanced_weights(counts: list[int]) -> Tensor:
    """Weights [K] with which all classes contribute equally: ``N / (K count)``."""
    images = torch.tensor(counts, dtype=torch.float32)
    return images.sum() / (len(counts) * images.clamp_min(1))
