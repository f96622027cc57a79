"""The data sets, samplers and loaders of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from condconv_surgery.data.find_data import DividedData, divide, find_parts, require_data
from condconv_surgery.data.hub_streams import HubStream, StreamDataset, find_streams
from condconv_surgery.data.image_dataset import Batch, ImageDataset, Sample, Transform, collate, collate_whole
from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.errors import InputError
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.modes import input_spec_of
from condconv_surgery.training.batches.augmentation import least_side, training_transform
from condconv_surgery.training.batches.samplers import EvaluationBatches, Steps, TrainingBatches
from condconv_surgery.training.batches.stream_batches import StreamBatches, StreamEvaluation
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.explained_errors import reading
from condconv_surgery.training.state.stop_signals import ignore_signals


@dataclass(frozen=True)
class Data:
    """The images of a run and the loaders of this process."""

    train: LabelledImages | HubStream
    val: LabelledImages | HubStream
    order: Steps
    train_loader: DataLoader[Batch]
    val_loader: DataLoader[Batch]
    divided: DividedData | None = None
    """Images that the options name, which a run checks before its first step."""

    def batches_from(self, step: int) -> Iterator[Batch]:
        """Training batches from a step of the run on. Only one iterator at a time."""
        self.order.start = step
        return reading(iter(self.train_loader))

    def fingerprint(self) -> str:
        """Hash of the training and the validation images."""
        return f"{self.train.fingerprint()} {self.val.fingerprint()}"

    def close(self) -> None:
        """End the workers. While torch knows of a dead one, it raises again whenever any child process ends."""
        with ExitStack() as stack:
            for loader in (self.train_loader, self.val_loader):
                if isinstance(loader._iterator, _MultiProcessingDataLoaderIter):
                    stack.callback(loader._iterator._shutdown_workers)
                loader._iterator = None


TrainAndVal = tuple[LabelledImages, LabelledImages]


def open_data(options: TrainingOptions, spec: InputSpec, world: World, images: TrainAndVal | None = None) -> Data:
    """Find the images and make the loaders. Raises ``InputError`` for data that cannot be used.

    images: training and validation images, instead of those that ``options.data`` names.
    """
    if images is None:
        require_data(options.data)
    transforms = training_transform(spec, options.augment), EvaluationTransform(spec)
    if images is None and options.data.streaming:
        return _streamed(options, spec, world, *transforms)
    divided = divide(find_parts(options.data), options.data, options.seed) if images is None else None
    train, val = images or (divided.train, divided.val)  # type: ignore[union-attr]
    steps = _steps(options, len(train), world)

    def dataset(which: LabelledImages, transform: Transform, replace: bool, least: int) -> ImageDataset:
        return ImageDataset(which, transform, channels=spec.channels, seed=options.seed, replace=replace, least=least)

    sides = least_side(spec, options.augment), transforms[1].least

    return Data(
        train,
        val,
        steps,
        _loader(
            dataset(train, transforms[0], True, sides[0]),
            TrainingBatches(steps, options.seed, world.rank),
            options,
            world,
        ),
        _loader(
            dataset(val, transforms[1], False, sides[1]),
            EvaluationBatches(len(val), steps.slice_size, rank=world.rank, world=world.size),
            options,
            world,
        ),
        divided,
    )


def _streamed(
    options: TrainingOptions, spec: InputSpec, world: World, training: Transform, scoring: EvaluationTransform
) -> Data:
    if options.optimizer.class_weights:
        raise InputError(
            "optimizer.class_weights=True with data.streaming=True.",
            "Classes are weighted by their number of images, which is not known of a stream.",
            "optimizer.class_weights=False, or data.streaming=False",
        )
    train, val = find_streams(options.data)
    steps = _steps(options, len(train), world)

    def rows(which: HubStream, transform: Transform, least: int) -> StreamDataset:
        return StreamDataset(which.title, transform, channels=spec.channels, seed=options.seed, least=least)

    order = StreamBatches(train, steps, options.seed, options.data.buffer, world)
    each = StreamEvaluation(val, steps.slice_size, world)
    loaders = (
        _loader(rows(train, training, least_side(spec, options.augment)), order, options, world, collate_whole),
        _loader(rows(val, scoring, scoring.least), each, options, world),
    )
    return Data(train, val, steps, *loaders)


def _steps(options: TrainingOptions, count: int, world: World) -> Steps:
    accumulate = options.optimizer.accumulate
    epochs, batch_size = options.schedule.epochs, options.data.batch_size
    return Steps(count, batch_size, epochs=epochs, world=world.size, accumulate=accumulate)


def _loader(
    dataset: Dataset[Sample],
    batches: Sampler[list[Any]],
    options: TrainingOptions,
    world: World,
    collate_fn: Callable[[Sequence[Sample]], Batch] = collate,
) -> DataLoader[Batch]:
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=options.data.workers,
        worker_init_fn=ignore_signals,
        collate_fn=collate_fn,
        pin_memory=world.device.type == "cuda",
        persistent_workers=options.data.workers > 0,
    )


def input_spec(model: nn.Module, options: TrainingOptions) -> InputSpec:
    """The input of the model, with ``data.image_size`` where it is set."""
    spec = input_spec_of(model)
    side = options.data.image_size
    return spec if side is None else replace(spec, height=side, width=side)
