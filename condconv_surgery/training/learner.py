"""The model with its optimizer, average, scaler and teacher: one step, and what a saved state must hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import DivergedError, InputError
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.training_sections import OptimizerOptions
from condconv_surgery.runtime.seeding import seed_of
from condconv_surgery.runtime.tensor_hash import hash_weights
from condconv_surgery.training.batch_norm import freeze_batch_norms
from condconv_surgery.training.batches.augmentation import batch_mix
from condconv_surgery.training.distillation import Teacher, teacher_model
from condconv_surgery.training.distributed.fsdp import UnshardedCopy, check_sharding, shard
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.gate_regularization import ExpertDropout
from condconv_surgery.training.gradient_checkpointing import checkpoint_blocks, uncheckpoint
from condconv_surgery.training.monitor.nonfinite import WEIGHTS, first_nonfinite, first_nonfinite_gradient
from condconv_surgery.training.objective import Objective, balanced_weights
from condconv_surgery.training.optimization.optimizers import make_optimizer
from condconv_surgery.training.optimization.parameter_groups import freeze, routing_parameters
from condconv_surgery.training.optimization.weight_average import averaged
from condconv_surgery.training.schedule import apply_schedule, apply_temperature
from condconv_surgery.training.state.run_files import new_run
from condconv_surgery.training.state.run_state import (
    State,
    model_part,
    optimizer_part,
    restore_model,
    restore_optimizer,
)
from condconv_surgery.training.step import NonFiniteError, autocast, train_step
from condconv_surgery.training.tally import Tally

SKIPS_ALLOWED = 100
"""Steps in a row that loss scaling may skip before the run counts as diverged."""

HIGHEST_RATE = 1.0
"""A learning rate above it is taken for a mistake."""

LONG_WARMUP = 0.2
"""The share of all steps that is advised for the warm-up of a run that diverged."""

FINITE = "the loss; every layer's output in this process is finite"


class Learner:
    """A model that can take a step, be scored, saved and restored. ``close`` removes hooks and wrappers.

    counts: training images per class. heads: widths of new classifier heads by name.
    """

    def __init__(
        self, model: nn.Module, options: TrainingOptions, world: World, counts: list[int], heads: dict[str, int]
    ) -> None:
        self.options, self.world = options, world
        self.model = prepared(model, options, world)
        layers, engine = options.layers, options.engine
        self.average = averaged(model, engine)
        teacher = teacher_model(options.distill, model, heads, options.trust)
        self.unsharded = UnshardedCopy(model, world) if engine.shard else None
        if engine.shard:  # after the copies: a sharded model has none
            for module in [model] if self.average is None else [model, self.average.module]:
                shard(module, world)
        self.only = routing_parameters(model, heads) if layers.warm_routers else None
        self.optimizer = make_optimizer(model, options.optimizer, layers)
        self.start = teacher if options.distill.teacher == "start" else None  # a model in memory has been trained since
        self.taught_by = "" if teacher is None or teacher is self.start else hash_weights(teacher)
        self.teacher = None if teacher is None else Teacher(teacher.to(world.device), model, options.distill)
        weights = balanced_weights(counts).to(world.device) if options.optimizer.class_weights else None
        self.objective = Objective(model, options, weights, self.teacher)
        self.dropout = ExpertDropout(model, layers.expert_dropout) if layers.expert_dropout else None
        self.blocks = checkpoint_blocks(model) if engine.checkpointing else []
        self.mix = batch_mix(options.augment, len(counts))
        self.cast = autocast(world.device, engine.precision)
        self.scaler = GradScaler(world.device.type) if engine.precision == "fp16" else None
        self.skipped = 0
        self.lr = 0.0
        self.forward = wrapped(self.model, options, world)

    @property
    def scored(self) -> nn.Module:
        """The model to score and save: the averaged one, if there is one."""
        if self.average is None:
            return self.model
        module: nn.Module = self.average.module
        return module

    def step(self, batches: Sequence[Batch], step: int, steps: int) -> Tally:
        """Step number ``step`` of ``steps``; its random numbers are a function of step and process only.

        Raises ``DivergedError`` when the loss or the gradient is not finite.
        """
        torch.manual_seed(seed_of(self.options.seed, "step", step, self.world.rank))
        self.lr = self.options.optimizer.lr * apply_schedule(
            self.model, self.optimizer, step, steps, self.options.schedule
        )
        warm = step * self.options.schedule.epochs < self.options.layers.warm_routers * steps
        self.objective.prepare([batch.labels for batch in batches], self.world)
        buffers = [b.clone() for b in self.model.buffers()] if self.scaler is not None else []
        try:
            outcome = train_step(
                self.forward,
                self.optimizer,
                batches,
                loss_of=self.objective,
                mix=self.mix,
                cast=self.cast,
                scaler=self.scaler,
                clip_norm=self.options.optimizer.clip_norm,
                only=self.only if warm else None,
                world=self.world,
            )
        except OverflowError as error:
            raise self.diverged("step of the optimizer", f"its own arithmetic: {error}", step + 1) from error
        except NonFiniteError as error:
            raise self._diverged(error.where, batches, step) from None
        if outcome.skipped:
            self._skip(buffers, step)
        else:
            self.skipped = 0
            if self.average is not None:
                self.average.update(self.model, step)
                # that of the step, not a mean of temperatures
                apply_temperature(self.average.module, step, steps, self.options.schedule)
        return outcome.tally

    def to_save(self) -> nn.Module | None:
        """``scored``, unsharded, for the first process to save. Collective: all processes must call it together."""
        if self.unsharded is None:
            return self.scored
        return self.unsharded.filled(self.scored)

    def share_buffers(self) -> None:
        """Broadcast the batch-norm statistics of the first process, which saves them: all score the same model."""
        self.world.broadcast_(list(self.scored.buffers()))
        self.world.broadcast_(list(self.model.buffers()))

    def state(self, facts: dict[str, Any]) -> State:
        """All that a later process needs to resume, with ``facts`` of the caller."""
        tensors, plain = optimizer_part(self.optimizer)
        tensors |= model_part(self.model)
        if self.average is not None:
            tensors |= model_part(self.average, "average")
        if self.start is not None:
            tensors |= model_part(self.start, "start")
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return State(tensors, {**facts, "optimizer": plain, "scaler": scaler})

    def restore(self, state: State) -> None:
        """Restore a state. Raises ``TrainingError`` when it is of another model."""
        name, folder = str(state.facts.get("options", {}).get("model", "")), Path(self.options.output)
        restore_model(self.model, state.part("model"), name, folder)
        restore_optimizer(self.optimizer, state.part("optimizer"), state.facts["optimizer"])
        if self.average is not None:
            restore_model(self.average, state.part("average"), name, folder)
        if self.start is not None and (tensors := state.part("start")):  # an older state has none
            restore_model(self.start, tensors, name, folder)
        if self.scaler is not None:
            self.scaler.load_state_dict(state.facts["scaler"])

    def close(self) -> None:
        """Remove hooks and wrappers from the model."""
        self.objective.close()
        if self.dropout is not None:
            self.dropout.close()
        uncheckpoint(self.blocks)

    def _skip(self, buffers: list[torch.Tensor], step: int) -> None:
        """Restore the buffers: an overflow must not stay in batch-norm statistics."""
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.skipped += 1
        if self.skipped > SKIPS_ALLOWED:
            raise DivergedError(
                f"Loss scaling skipped {self.skipped} steps in a row, to step {step + 1}.",
                "Gradients are not finite in float16, even at a small loss scale.",
                'engine.precision="bf16" or "fp32", or a smaller optimizer.lr=..., in a new run',
            )

    def diverged(self, what: str, place: str | None, step: int) -> DivergedError:
        """The error for a ``what`` that is not finite after ``step`` steps, first in ``place``."""
        if step == 1 and place and place.startswith(WEIGHTS):
            return DivergedError(
                f"The model has weights that are not finite before the first step: {place.removeprefix(WEIGHTS)}.",
                "Training cannot mend them.",
                "the model from before they became so, an earlier checkpoint",
            )
        options = self.options
        rate = options.optimizer.lr / 3 if options.optimizer.lr <= HIGHEST_RATE else OptimizerOptions().lr
        warmup = min(1.0, max(LONG_WARMUP, 3 * options.schedule.warmup))
        slower = new_run(Path(options.output), f"optimizer.lr={rate:.2g}, schedule.warmup={warmup:.2g}")
        precise = "" if options.engine.precision == "fp32" else '; or engine.precision="fp32"'
        return DivergedError(
            f"The {what} is not finite at step {step}; first in {place or FINITE}.",
            "",
            f"{slower}{precise}",
        )

    def _diverged(self, where: str, batches: Sequence[Batch], step: int) -> DivergedError:
        if where != "loss":
            return self.diverged(where, first_nonfinite_gradient(self.model), step + 1)
        seed = seed_of(self.options.seed, "step", step, self.world.rank)
        images = [batch.images.to(self.world.device) for batch in batches]
        return self.diverged(where, first_nonfinite(self.model, images, self.cast, seed), step + 1)


def prepared(model: nn.Module, options: TrainingOptions, world: World) -> nn.Module:
    """``model`` on its device, in train mode, with layers and batch norms frozen as in the options."""
    engine = options.engine
    check_sharding(engine, world)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise InputError(
                f"{name} is {parameter.dtype}.",
                "Weights are trained in float32; engine.precision is that of the computation (autocast).",
                'model.float(), and engine.precision="bf16"',
            )
    if engine.sync_batch_norm and world.device.type != "cuda":
        raise InputError(
            "engine.sync_batch_norm=True on a CPU.",
            "Torch supports synchronised batch norms on GPUs only.",
            "engine.sync_batch_norm=False",
        )
    if engine.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    model.train()
    if not engine.shard:  # that moves it piece by piece
        model.to(world.device)
    if engine.channels_last:
        for parameter in model.parameters():
            if parameter.dim() == 4:  # model.to(memory_format=...) fails where there is an nn.Conv3d
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    frozen = freeze(model, options.layers.freeze)
    freeze_batch_norms(model, None if options.layers.batch_norm == "freeze" else frozen)
    return model


def wrapped(model: nn.Module, options: TrainingOptions, world: World) -> nn.Module:
    """``model`` as a step calls it: wrapped for several processes and compiled, where needed."""
    called = model
    if world.size > 1 and not options.engine.shard:
        devices = [world.device] if world.device.type == "cuda" else None
        called = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    if options.engine.compile:
        called = torch.compile(called)  # type: ignore[assignment]
    return called
