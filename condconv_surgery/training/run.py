"""One training run from start to end: prepare, restore, train, score, save."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import InputError, one_line
from condconv_surgery.models.artifact.save_load import save
from condconv_surgery.recipe.toml_text import RECIPE, to_toml
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.seeding import seeded
from condconv_surgery.training.batch_norm import recalibrate, require_two_values
from condconv_surgery.training.batches.check_before_run import report_check
from condconv_surgery.training.batches.loaders import Data, TrainAndVal, input_spec, open_data
from condconv_surgery.training.batches.unreadable_images import UnreadableImages
from condconv_surgery.training.classifier_heads import fit_heads
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.evaluation import score
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.monitor.callback import Callback
from condconv_surgery.training.monitor.expert_use import ExpertUse, without_effect
from condconv_surgery.training.monitor.opening_notes import opening_notes, renamed_note
from condconv_surgery.training.monitor.run_metrics import Meter, temperature_of
from condconv_surgery.training.monitor.run_summary import start_lines
from condconv_surgery.training.monitor.training_curves import draw_curves
from condconv_surgery.training.state.image_record import with_recorded_images, write_image_record
from condconv_surgery.training.state.leaf_modules import (
    frozen_parameters,
    leaf_modules,
    require_same_frozen,
    require_same_modules,
)
from condconv_surgery.training.state.progress import Progress, TrainingResult
from condconv_surgery.training.state.resume import METRICS, began_with, cut_metrics, require_fresh, require_same_run
from condconv_surgery.training.state.run_files import (
    copy_file,
    failing_resumably,
    read_rows,
    write_rows,
    write_text,
)
from condconv_surgery.training.state.run_lock import RunLock
from condconv_surgery.training.state.run_state import State, load_state, save_state
from condconv_surgery.training.state.stop_signals import StopRequest
from condconv_surgery.training.state.written_options import with_absolute_paths
from condconv_surgery.training.tally import Tally

CURVES = "curves.png"
RECALIBRATION_BATCHES = 100


class Run:
    """One training run: data, learner, progress and files."""

    def __init__(
        self,
        model: nn.Module,
        options: TrainingOptions,
        world: World,
        request: StopRequest,
        callback: Callback,
        lock: RunLock | None = None,
        images: TrainAndVal | None = None,
        resume: bool = False,
    ) -> None:
        self.options, self.world, self.request, self.callback = options, world, request, callback
        self.folder, self.resume = Path(options.output), resume
        self.lock = lock or RunLock(self.folder)  # one that is not acquired does nothing
        self.spec = spec = input_spec(model, options)
        self.data: Data = open_data(options, spec, world, images)
        self.state, trouble = load_state(self.folder) if resume else (None, "")
        self.opening_notes = [f"{trouble} Resuming from the previous state."] if trouble else []
        if self.state is not None:
            self.data, notes = with_recorded_images(self.data, self.folder, self.state, options, spec, world)
            self.opening_notes += notes
        before = classes_of(model)
        with seeded(options.seed, "head"):
            self.heads = fit_heads(model, self.data.train.classes, spec)
        if self.state is not None:  # a model in memory has had its new heads since the run began
            self.heads = began_with(self.state, self.heads, model)
        self.modules = leaf_modules(model)
        self.model_notes = opening_notes(model, spec, options, self.heads, self.data.order.steps)
        self.model_notes += renamed_note(before, self.data.train.classes, self.heads)
        self.learner = Learner(model, options, world, self.data.train.counts(), self.heads)
        require_two_values(self.learner.model, spec, options, world.size, self.data.order.slice_size)
        self.black = torch.zeros(1, spec.channels, spec.height, spec.width, device=world.device)
        self.unreadable = UnreadableImages(options.data.max_bad, world=world, note=callback.note)
        self.progress = Progress()
        self.saved_step = 0
        self.is_consistent = True  # between steps: progress, weights and files are of one moment
        self.uses: dict[str, ExpertUse] = {}
        self.meter = Meter(world.device, options.schedule.epochs, self.data.order.steps)

    def begin(self) -> None:
        """Restore the state, if there is one; write and note what the run begins with."""
        state, self.state = self.state, None
        if not self.resume:
            require_fresh(self.folder)
        for line in self.opening_notes:
            self.callback.note(line)
        if state is not None:
            self._restore(state)
        self.world.barrier()  # every process has read the state before rank 0 writes
        if self.world.is_first:
            write_text(self.folder / RECIPE, to_toml(with_absolute_paths(self.options)))
            if lost := cut_metrics(self.folder, self.progress.epochs_done):
                self.callback.note(lost)
            if state is None:
                write_image_record(self.folder, self.data.train, self.data.val)
        self.callback.rewind(self.progress.step)
        if self.data.divided is not None:
            report_check(self.data.divided, self.folder, self.unreadable, self.callback, self.world)
        for line in self.model_notes:
            self.callback.note(line)
        self.callback.begin(start_lines(self.learner.model, self.options, self.spec, self.data.order, self.world))

    def _restore(self, state: State) -> None:
        order = self.data.order
        written = with_absolute_paths(self.options)
        now = written, self.data.fingerprint(), self.learner.taught_by, self.world.size
        require_same_run(state, *now, order.steps, self.folder)
        self.saved_step = state.facts["progress"]["step"]
        if before := state.facts.get("modules"):
            require_same_modules(before, self.modules, state.facts["options"]["model"], self.folder)
        if (frozen := state.facts.get("frozen")) is not None:
            require_same_frozen(frozen, frozen_parameters(self.learner.model), self.folder)
        self.learner.restore(state)
        self.progress = Progress.from_dict(state.facts["progress"])
        self.unreadable.names = list(state.facts.get("unreadable", []))
        self.callback.note(f"Resuming after step {self.progress.step}, epoch {self.progress.epochs_done}.")
        if state.facts["options"]["schedule"]["epochs"] != self.options.schedule.epochs:
            self.callback.note("The number of epochs has changed: learning rate and temperature follow the new length.")

    def close(self) -> None:
        """End the workers, the display and the hooks; each, even if another fails."""
        with ExitStack() as stack:
            for close in (self.learner.close, self.callback.close, self.data.close):
                stack.callback(close)

    def train(self) -> TrainingResult:
        """Train epoch after epoch, until the end or a request to stop."""
        order, progress = self.data.order, self.progress
        batches = self.data.batches_from(progress.step)
        while progress.epochs_done < self.options.schedule.epochs and not self.patience_is_over():
            while progress.step < (progress.epochs_done + 1) * order.steps_per_epoch:
                if self.advance(batches):
                    return self.stopped()
            self.finish_statistics()
            scores = self.evaluate()
            if scores is None:
                return self.stopped()
            self.end_epoch(scores)
        if progress.epochs_done < self.options.schedule.epochs:
            self.callback.note(
                f"Stopped early after epoch {progress.epochs_done}: no better top-1 since epoch {progress.best_epoch}."
            )
        if note := without_effect(self.learner.scored, self.uses):
            self.callback.note(note)
        self.draw()
        return self.result()

    def advance(self, batches: Iterator[Batch]) -> bool:
        """One step, the exchange between processes, and a saved state where one is due; true: the run stops."""
        self.lock.beat()
        self.step(batches)
        stops, unreadable = self.world.sum([float(bool(self.request)), float(len(self.unreadable.waiting))])
        if unreadable:
            self.unreadable.share()
        if not stops and self.progress.step % self.options.engine.save_every == 0:
            self.save()
        return bool(stops)

    def step(self, batches: Iterator[Batch]) -> None:
        progress, order = self.progress, self.data.order
        step_batches = list(islice(batches, order.accumulate))
        for batch in step_batches:
            self.unreadable.add(batch.unreadable)
            if not len(batch.labels):
                raise InputError(
                    f"No image of a batch can be read: {self.unreadable.explained(batch.unreadable[:3])}, ...",
                    "Unreadable images are replaced by others of their batch or set.",
                    "repair or remove them",
                )
        self.is_consistent = False
        tally = self.learner.step(step_batches, progress.step, order.steps)
        progress.step += 1
        progress.tally = progress.tally + tally
        self.is_consistent = True
        images = sum(len(batch.labels) for batch in step_batches) * self.world.size
        self.meter.count(0 if self.learner.skipped else images)
        self.callback.step(self.meter.view(progress, self.learner.lr))

    def finish_statistics(self) -> None:
        """After the last step, recompute batch-norm statistics if the options ask for it."""
        last = self.progress.step == self.data.order.steps
        if last and self.options.layers.batch_norm == "recalibrate":
            batches = islice(self.data.batches_from(0), RECALIBRATION_BATCHES)
            norms = recalibrate(self.learner.scored, batches, world=self.world, cast=self.learner.cast)
            self.callback.note(f"Recomputed the statistics of {norms} batch norms.")

    def end_epoch(self, scores: Tally) -> None:
        """Record the scores of an epoch and save its model and state."""
        progress, self.is_consistent = self.progress, False
        progress.epochs_done += 1
        best = (scores.top1, -scores.loss) > (progress.best_top1, -progress.best_loss)
        if best:
            progress.best_top1, progress.best_loss, progress.best_epoch = scores.top1, scores.loss, progress.epochs_done
        model = self.learner.scored
        row = self.meter.row(progress, self.learner.lr, temperature_of(model), scores, best)
        progress.tally = Tally()
        finished = self.learner.to_save()
        if self.world.is_first and finished is not None:
            last = self.folder / "last.safetensors"
            with failing_resumably():
                save(finished, last, alone=False)
            if best:
                copy_file(last, self.folder / "best.safetensors")
            write_rows(self.folder / METRICS, [*read_rows(self.folder / METRICS), row.to_dict()])
        self.callback.epoch(row)
        self.save()
        self.is_consistent = True
        self.meter.restart()

    def evaluate(self) -> Tally | None:
        """Score the validation images; ``None`` when the run is to stop."""
        scored = score(
            self.learner, self.data.val_loader, self.black, self.unreadable, self.interrupted, self.progress.step
        )
        if scored is None:
            return None
        scores, self.uses = scored
        self.callback.gates(self.progress.epochs_done + 1, self.uses)
        return scores

    def interrupted(self) -> bool:
        """Called with each validation batch: is the run to stop?"""
        self.lock.beat()
        return bool(self.request)

    def save(self) -> None:
        """Write the state, from rank 0; every process has the same weights, or a part of them."""
        if self.world.is_first or self.options.engine.shard:
            facts = {
                "progress": self.progress.to_dict(),
                "options": with_absolute_paths(self.options).to_dict(),
                "fingerprint": self.data.fingerprint(),
                "teacher": self.learner.taught_by,
                "processes": self.world.size,
                "unreadable": self.unreadable.names,
                "modules": self.modules,
                "heads": self.heads,
                "frozen": frozen_parameters(self.learner.model),
            }
            self.callback.flush()
            state = self.learner.state(facts)
            if self.world.is_first:
                save_state(self.folder, state)
        self.saved_step = self.progress.step

    def rescue(self) -> None:
        """Save the state before an error ends the run, where it is consistent and this process can do it alone."""
        if self.is_consistent and self.progress.step > self.saved_step and not self.options.engine.shard:
            with suppress(Exception):  # the error that ends the run counts, not a second one
                self.save()

    def kept(self, error: Exception) -> str:
        """A sentence for an error: which state is kept. (An error in the input comes before there could be one.)"""
        if self.saved_step:
            return f"The state after step {self.saved_step} is kept."
        return "" if isinstance(error, InputError) else "No state had been saved."

    def patience_is_over(self) -> bool:
        """True after ``early_stop`` epochs without a better top-1."""
        patience = self.options.schedule.early_stop
        return bool(patience) and self.progress.epochs_done - self.progress.best_epoch >= patience

    def stopped(self) -> TrainingResult:
        """Save the state, draw the curves and report how to resume."""
        self.save()
        self.draw()
        self.callback.note(
            f"Stopped by {signal.Signals(self.request.signal).name if self.request else 'another process'} after step "
            f"{self.progress.step}; state saved. The same call with resume=True continues."
        )
        return self.result(stopped=True)

    def draw(self) -> None:
        """Draw the curves of the epochs so far. Where that fails, on a full disk, a note says so: the rest is saved."""
        if self.world.is_first and (rows := read_rows(self.folder / METRICS)):
            try:
                draw_curves(rows, self.folder / CURVES)
            except Exception as error:  # matplotlib has files of its own, too
                why = getattr(error, "given", one_line(error)).rstrip(".")
                self.callback.note(f"No curves: {why}. Everything else is saved; resume=True draws them later.")

    def result(self, stopped: bool = False) -> TrainingResult:
        rows = read_rows(self.folder / METRICS)
        last = rows[-1] if rows else {}
        return TrainingResult(
            output=str(self.folder),
            epochs=self.progress.epochs_done,
            steps=self.progress.step,
            train_images=len(self.data.train),
            val_images=last.get("val_images") or len(self.data.val),
            classes=self.data.train.classes,
            heads=self.heads,
            top1=last.get("val_top1"),
            loss=last.get("val_loss"),
            best_top1=self.progress.best_top1 if self.progress.best_epoch else None,
            best_epoch=self.progress.best_epoch,
            unreadable=tuple(self.unreadable.names),
            stopped_by=self.request.number if stopped else 0,
        )
