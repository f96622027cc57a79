"""From folders to batches: data sets, samplers and loaders of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from condconv_surgery.models.artifact import recipe_of
from condconv_surgery.models.preprocess import evaluation_transform
from condconv_surgery.recipe import InputSpec, Recipe
from condconv_surgery.recipe.training import TrainingOptions
from condconv_surgery.training.distributed import World
from condconv_surgery.training.folders import Pictures, find_pictures
from condconv_surgery.training.pictures import Batch, PictureDataset, Transform, collate
from condconv_surgery.training.sampling import EvaluationBatches, TrainingBatches
from condconv_surgery.training.stopping import ignore_signals
from condconv_surgery.training.transforms import training_transform


@dataclass(frozen=True)
class Data:
    """The pictures of a run and how this process takes them."""

    train: Pictures
    val: Pictures
    order: TrainingBatches
    train_loader: DataLoader[Batch]
    val_loader: DataLoader[Batch]

    def batches_from(self, step: int) -> Iterator[Batch]:
        """Training batches from a step of the whole run on. One iterator at a time."""
        self.order.start = step
        return iter(self.train_loader)


def open_data(options: TrainingOptions, spec: InputSpec, world: World) -> Data:
    """Find the pictures and make the loaders. Raises ``InputError`` for a folder that cannot be trained on."""
    train, val = find_pictures(Path(options.data.folder), options.data.val_fraction, options.seed)
    order = TrainingBatches(
        len(train),
        options.data.batch_size,
        epochs=options.schedule.epochs,
        seed=options.seed,
        rank=world.rank,
        world=world.size,
        accumulate=options.optimizer.accumulate,
    )
    each = EvaluationBatches(len(val), order.slice_size, rank=world.rank, world=world.size)

    def loader(
        pictures: Pictures, transform: Transform, sampler: TrainingBatches | EvaluationBatches, substitute: bool
    ) -> DataLoader[Batch]:
        return DataLoader(
            PictureDataset(pictures, transform, channels=spec.channels, seed=options.seed, replace=substitute),  # type: ignore[arg-type]
            batch_sampler=sampler,
            num_workers=options.data.workers,
            worker_init_fn=ignore_signals,
            collate_fn=collate,
            pin_memory=world.device.type == "cuda",
            persistent_workers=options.data.workers > 0,
        )

    return Data(
        train,
        val,
        order,
        loader(train, training_transform(spec, options.augment), order, True),
        loader(val, evaluation_transform(spec), each, False),
    )


def input_spec(model: nn.Module, options: TrainingOptions) -> InputSpec:
    """The model's own input, with the side that the options ask for."""
    spec = (recipe_of(model) or Recipe()).input
    side = options.data.image_size
    return spec if side is None else replace(spec, height=side, width=side)
