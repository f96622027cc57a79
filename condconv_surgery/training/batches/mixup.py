"""Mixup and CutMix of torchvision on a batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import v2

from condconv_surgery.recipe.training_sections import AugmentOptions

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def batch_mix(options: AugmentOptions, classes: int) -> Mix | None:
    """``images, labels [B] -> images, shares [B, K]``, random by torch's global generator; ``None`` when off.

    With both, each batch uses one of them at random.
    """
    mixes: list[Mix] = []
    if options.mixup:
        mixes.append(v2.MixUp(alpha=options.mixup, num_classes=classes))
    if options.cutmix:
        mixes.append(v2.CutMix(alpha=options.cutmix, num_classes=classes))
    if not mixes:
        return None
    chosen: Mix = v2.RandomChoice(mixes) if len(mixes) > 1 else mixes[0]
    return chosen
