"""Augmentation: random transforms of each training image, and mixup and CutMix of a batch, by torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import cast

from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from condconv_surgery.data.image_dataset import Transform
from condconv_surgery.models.preprocess import REDUCING_GAP, normalised
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import AugmentOptions

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def training_transform(spec: InputSpec, options: AugmentOptions) -> Transform:
    """PIL image -> normalised tensor [C, H, W] of the model's size, random by torch's global generator."""
    steps: list[object] = [
        v2.RandomResizedCrop(
            (spec.height, spec.width),
            scale=options.crop,
            interpolation=InterpolationMode(spec.interpolation),
            antialias=True,
        )
    ]
    if options.flip:
        steps.append(v2.RandomHorizontalFlip(options.flip))
    if options.policy == "randaugment":
        steps.append(v2.RandAugment(magnitude=options.magnitude))
    elif options.policy == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    steps.append(partial(normalised, spec=spec))
    if options.erasing:
        steps.append(v2.RandomErasing(options.erasing))
    return cast(Transform, v2.Compose(steps))


def least_side(spec: InputSpec, options: AugmentOptions) -> int:
    """Pixels of an image's shorter side that training needs: twice the input for a mean crop, once for the smallest."""
    side, (small, large) = max(spec.height, spec.width), options.crop
    return math.ceil(max(REDUCING_GAP * side / math.sqrt((small + large) / 2), side / math.sqrt(small * 3 / 4)))


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
