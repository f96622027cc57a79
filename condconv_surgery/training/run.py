"""A whole training run, read from top to bottom: prepare, restore, train, score, save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from condconv_surgery.errors import TrainingError
from condconv_surgery.models.artifact import recipe_of, save
from condconv_surgery.recipe import InputSpec, Recipe
from condconv_surgery.recipe.toml_text import to_toml
from condconv_surgery.recipe.training import TrainingOptions
from condconv_surgery.training.distributed import World, open_world
from condconv_surgery.training.evaluation import Tally, evaluate
from condconv_surgery.training.files import make_folder, read_rows, write_rows, write_text
from condconv_surgery.training.groups import parameter_groups
from condconv_surgery.training.heads import fit_heads
from condconv_surgery.training.loading import Data, open_data
from condconv_surgery.training.meter import Meter, temperature_of
from condconv_surgery.training.pictures import Batch, Unreadable
from condconv_surgery.training.progress import Progress, TrainingResult
from condconv_surgery.training.resuming import METRICS, RECIPE, cut_metrics, require_fresh, require_same_run
from condconv_surgery.training.schedule import apply_schedule
from condconv_surgery.training.seeding import seed_of, seeded
from condconv_surgery.training.state import (
    State,
    load_state,
    model_part,
    optimizer_part,
    restore_model,
    restore_optimizer,
    save_state,
)
from condconv_surgery.training.step import NonFiniteLossError, autocast, classification_loss, train_step
from condconv_surgery.training.stopping import StopWish, watching_signals
from condconv_surgery.training.watching import Silent, Watcher


def finetune(
    model: nn.Module, options: TrainingOptions, *, resume: bool = False, watcher: Watcher | None = None
) -> TrainingResult:
    """Train ``model``, in place, as ``options`` say; writes into the folder ``options.output``:

    ``last.safetensors`` and ``best.safetensors`` (artifacts), ``metrics.jsonl`` (a row per epoch), ``recipe.toml`` (the
    effective options), ``state.safetensors`` (to go on from).

    resume: go on from the state in the folder; the final weights are those of a run that was never stopped.
    SIGTERM or Ctrl-C save the state and return early (``stopped_by``). Seeds torch's global generators.

    Raises ``InputError`` for options, pictures or folders that cannot be used, ``TrainingError`` when training cannot
    go on, ``DamagedFileError`` when no whole state is left.
    """
    with open_world() as world, watching_signals() as wish:
        run = Run(model, options, world, wish, watcher if watcher and world.speaks else Silent())
        run.begin(resume)
        try:
            return run.train()
        finally:
            run.watcher.close()


class Run:
    """The parts of a run and where it stands."""

    def __init__(
        self, model: nn.Module, options: TrainingOptions, world: World, wish: StopWish, watcher: Watcher
    ) -> None:
        self.options, self.world, self.wish, self.watcher = options, world, wish, watcher
        self.folder = Path(options.output)
        spec = input_spec(model, options)
        self.data: Data = open_data(options, spec, world)
        with seeded(options.seed, "head"):
            self.heads = fit_heads(model, self.data.train.classes, spec)
        self.model = model.to(world.device).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(model, options.optimizer), lr=options.optimizer.lr)
        self.forward = wrapped(self.model, world)
        self.cast = autocast(world.device, options.engine.precision)
        self.unreadable = Unreadable(options.data.max_bad)
        self.progress = Progress()
        self.meter = Meter(self.world.device, options.schedule.epochs, self.data.order.steps)

    def begin(self, resume: bool) -> None:
        """Make the folder, or take up the state in it."""
        if self.world.speaks:
            make_folder(self.folder)
        self.world.wait()
        if not resume:
            require_fresh(self.folder)
        state, trouble = load_state(self.folder) if resume else (None, "")
        if trouble:
            self.watcher.note(f"{trouble} Going on from the state before.")
        if state is not None:
            self.restore(state)
            self.watcher.note(f"Going on after step {self.progress.step}, epoch {self.progress.epochs_done}.")
        if self.world.speaks:
            write_text(self.folder / RECIPE, to_toml(self.options))
            cut_metrics(self.folder, self.progress.epochs_done)
        for name, width in self.heads.items():
            self.watcher.note(f"New head {name}: {width} classes.")

    def train(self) -> TrainingResult:
        """Epoch after epoch, until the end or a wish to stop."""
        order, progress = self.data.order, self.progress
        batches = self.data.batches_from(progress.step)
        while progress.epochs_done < self.options.schedule.epochs:
            while progress.step < (progress.epochs_done + 1) * order.steps_per_epoch:
                self.step(batches)
                if self.stopping():
                    return self.stopped()
                if progress.step % self.options.engine.save_every == 0:
                    self.save()
            scores = self.evaluate()
            if scores is None:
                return self.stopped()
            self.end_epoch(scores)
        return self.result()

    def step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step, its random numbers a function of the step and the process alone."""
        progress, order = self.progress, self.data.order
        taken = [next(batches) for _ in range(order.accumulate)]
        for batch in taken:
            self.note_unreadable(batch.unreadable)
        torch.manual_seed(seed_of(self.options.seed, "step", progress.step, self.world.rank))
        lr = apply_schedule(self.model, self.optimizer, progress.step, order.steps, self.options.schedule)
        smoothing = self.options.optimizer.label_smoothing
        try:
            tally = train_step(
                self.forward,
                self.optimizer,
                taken,
                loss_of=partial(classification_loss, smoothing=smoothing),
                cast=self.cast,
                clip_norm=self.options.optimizer.clip_norm,
                world=self.world,
            )
        except NonFiniteLossError:
            raise self.diverged() from None
        progress.step += 1
        progress.tally.add(tally.loss_sum, tally.right, tally.count)
        self.meter.count(tally)
        self.watcher.step(self.meter.view(progress, lr))

    def end_epoch(self, scores: Tally) -> None:
        """Note the epoch's numbers, then save what they belong to."""
        progress = self.progress
        progress.epochs_done += 1
        best = scores.top1 > progress.best_top1
        if best:
            progress.best_top1, progress.best_epoch = scores.top1, progress.epochs_done
        lr = float(self.optimizer.param_groups[0]["lr"])
        row = self.meter.row(progress, lr, temperature_of(self.model), scores, best)
        progress.tally = Tally()
        if self.world.speaks:
            save(self.model, self.folder / "last.safetensors")
            if best:
                save(self.model, self.folder / "best.safetensors")
            write_rows(self.folder / METRICS, [*read_rows(self.folder / METRICS), row.to_dict()])
        self.save()
        self.watcher.epoch(row)
        self.meter.restart()

    def evaluate(self) -> Tally | None:
        """Score the validation pictures; ``None`` when the run is to stop."""
        return evaluate(
            self.model,
            self.data.val_loader,
            world=self.world,
            cast=self.cast,
            interrupted=lambda: bool(self.wish),
            unreadable=self.note_unreadable,
        )

    def save(self) -> None:
        """Write the state, from rank 0; every process has the same weights."""
        if not self.world.speaks:
            return
        tensors, plain = optimizer_part(self.optimizer)
        facts = {
            "progress": self.progress.to_dict(),
            "optimizer": plain,
            "options": self.options.to_dict(),
            "fingerprint": self.fingerprint(),
        }
        save_state(self.folder, State({**model_part(self.model), **tensors}, facts))

    def restore(self, state: State) -> None:
        """Take up a state. Raises ``InputError`` when it is of another run."""
        require_same_run(state, self.options, self.fingerprint())
        restore_model(self.model, state.part("model"))
        restore_optimizer(self.optimizer, state.part("optimizer"), state.facts["optimizer"])
        self.progress = Progress.from_dict(state.facts["progress"])

    def fingerprint(self) -> str:
        """Of the training and the validation pictures."""
        return f"{self.data.train.fingerprint()} {self.data.val.fingerprint()}"

    def stopping(self) -> bool:
        """Some process was told to stop; all agree."""
        return bool(self.world.sum([float(bool(self.wish))])[0])

    def stopped(self) -> TrainingResult:
        """Save and say how to go on."""
        self.save()
        self.watcher.note(
            f"Stopped after step {self.progress.step}; state saved. Go on: condconv finetune -o {self.folder} --resume"
        )
        return self.result()

    def note_unreadable(self, names: tuple[str, ...]) -> None:
        """Count and name pictures that could not be read."""
        for name in self.unreadable.add(names) if names else []:
            self.watcher.note(f"Unreadable, passed over: {name}")

    def diverged(self) -> TrainingError:
        """The error for a loss that is not a number."""
        return TrainingError(
            f"The loss is not a number at step {self.progress.step + 1}.",
            "The state before this step is kept.",
            f"--lr {self.options.optimizer.lr / 3:.2g}, or a longer --warmup, in a new run",
        )

    def result(self) -> TrainingResult:
        """What the run has come to so far."""
        rows = read_rows(self.folder / METRICS)
        last = rows[-1] if rows else {}
        return TrainingResult(
            output=str(self.folder),
            epochs=self.progress.epochs_done,
            steps=self.progress.step,
            train_pictures=len(self.data.train),
            val_pictures=len(self.data.val),
            classes=self.data.train.classes,
            heads=self.heads,
            top1=last.get("val_top1"),
            loss=last.get("val_loss"),
            best_top1=self.progress.best_top1 if self.progress.best_epoch else None,
            best_epoch=self.progress.best_epoch,
            unreadable=tuple(self.unreadable.names),
            stopped_by=int(self.wish.signal),
        )


def input_spec(model: nn.Module, options: TrainingOptions) -> InputSpec:
    """The model's own input, with the side that the options ask for."""
    spec = (recipe_of(model) or Recipe()).input
    side = options.data.image_size
    return spec if side is None else replace(spec, height=side, width=side)


def wrapped(model: nn.Module, world: World) -> nn.Module:
    """``model`` as the training step calls it: with gradients averaged over processes when there are several."""
    if world.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[world.device] if world.device.type == "cuda" else None
    )
