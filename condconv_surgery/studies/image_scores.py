"""Which images a trained model classifies correctly, one digit an image."""

from __future__ import annotations

import torch
from torch import nn

from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.models.classifier_logits import logits_of
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.modes import in_mode
from condconv_surgery.training.batches.loaders import input_spec, open_data
from condconv_surgery.training.batches.samplers import EvaluationBatches
from condconv_surgery.training.batches.unreadable_images import UnreadableImages
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.explained_errors import reading
from condconv_surgery.training.step import autocast


def correct_images(model: nn.Module, images: LabelledImages, options: TrainingOptions, world: World) -> str:
    """A digit for each image, 1 right and 0 wrong, in eval mode without augmentation, over all processes.

    Unreadable images have no digit. Raises ``InputError`` for more of them than ``data.max_bad``.
    """
    data = open_data(options, input_spec(model, options), world, (images, images))
    batches = data.val_loader.batch_sampler
    assert isinstance(batches, EvaluationBatches)
    cast, right = autocast(world.device, options.engine.precision), dict[int, bool]()
    unreadable = UnreadableImages(options.data.max_bad, world=world)
    model.to(world.device)
    try:
        with torch.inference_mode(), in_mode(model, training=False):
            for draws, batch in zip(batches, reading(data.val_loader), strict=True):
                unreadable.add(batch.unreadable)
                if not len(batch.labels):
                    continue
                on_device = batch.to(world.device)
                with cast():
                    logits = logits_of(model(on_device.images)).main
                found = (logits.float().argmax(1) == on_device.labels).tolist()
                read = [draw.image for draw in draws if images.name(draw.image) not in batch.unreadable]
                right |= dict(zip(read, found, strict=True))
    finally:
        data.close()
    unreadable.share()
    together = {index: found for part in world.gather(right) for index, found in part.items()}
    return "".join("1" if together[index] else "0" for index in sorted(together))
