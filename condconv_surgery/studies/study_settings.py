"""What fixes a study: the settings that must be equal to continue it, and sentences that say what is done."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from condconv_surgery.data.three_parts import ThreeParts
from condconv_surgery.errors import counted
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.study_arms import Arm
from condconv_surgery.recipe.study_options import StudyOptions, rates_around
from condconv_surgery.recipe.study_record import StudyRecord
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.tensor_hash import hash_weights
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.state.resume import FREE, flattened


def settings_of(
    model: nn.Module, options: StudyOptions, training: TrainingOptions, parts: ThreeParts
) -> dict[str, Any]:
    """JSON values: model and images by their hashes, arms, seeds, budget, rates and training options."""
    shared = run_settings(model, training, parts)
    settings = {
        **shared,
        "arms": [arm.name for arm in options.arms],
        "arm": {arm.name: _arm(arm) for arm in options.arms},
        "seeds": options.seeds,
        "budget": options.budget,
        "rates": options.rates,
        "training": {**shared["training"], "schedule.epochs": training.schedule.epochs},
    }
    return _plain(settings)


def run_settings(model: nn.Module, training: TrainingOptions, parts: ThreeParts) -> dict[str, Any]:
    """JSON values: model and images by their hashes, and training options but for the number of epochs."""
    shared = {name: value for name, value in flattened(training.to_dict()).items() if name not in FREE}
    return _plain({"model": hash_weights(model), "images": parts.fingerprints(), "training": shared})


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=repr))  # functions in include= as their repr
    return plain


def protocol(
    options: StudyOptions, training: TrainingOptions, parts: ThreeParts, record: StudyRecord
) -> tuple[str, ...]:
    """Sentences that say what is done, for the report."""
    epochs = ", ".join(f"{arm.name} {arm.epochs}" for arm in record.arms)
    if options.budget == "time":
        budget = f"Equal time by the measured time of a step, so epochs differ: {epochs}."
    else:
        count = training.schedule.epochs
        budget = f"Equal steps: {counted(count, 'epoch')} for each arm."
    rates = rates_around(training.optimizer.lr, options.rates)
    if len(rates) > 1:
        search = (
            f"Learning rate: {len(rates)} tried for each arm ({', '.join(f'{lr:g}' for lr in rates)} unless an arm "
            f"has its own), full length, seed {training.seed}, the best by validation top-1."
        )
    else:
        search = "Learning rate: as given, no search."
    last = training.seed + options.seeds
    seeds = f"{training.seed + 1}" if options.seeds == 1 else f"{training.seed + 1} to {last}"
    return (
        f"Data: {parts.origin}",
        budget,
        search,
        f"Seed {seeds}: all arms see the same images in the same order with the same augmentation. The best epoch by "
        "validation top-1 is scored once on the test images, which nothing was selected on.",
    )


def environment(world: World, spec: InputSpec) -> dict[str, str]:
    """Size of the input, hardware and versions."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    return {
        "input": f"{spec.channels}x{spec.height}x{spec.width}",
        "device": f"{world.device.type} ({device})",
        "processes": str(world.size),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "variant": None if arm.variant is None else arm.variant.to_dict(),
        "selection": asdict(arm.selection),
        "upcycling": asdict(arm.upcycling),
        "training": arm.training,
    }
