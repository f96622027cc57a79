"""Random transforms of training images, with the normalisation of the model."""

from __future__ import annotations

from typing import cast

import torch
from torchvision.transforms import InterpolationMode, v2

from condconv_surgery.data.image_dataset import Transform
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import AugmentOptions


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
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
    if options.erasing:
        steps.append(v2.RandomErasing(options.erasing))
    return cast(Transform, v2.Compose(steps))
