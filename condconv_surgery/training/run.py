"""One training run from start to end: prepare, restore, train, score, save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.save_load import save, why_not_alone
from condconv_surgery.recipe import Recipe, recipe_of
from condconv_surgery.recipe.toml_text import to_toml
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.seeding import seeded
from condconv_surgery.training.batch_norm import recalibrate
from condconv_surgery.training.batches.check_before_run import report_check
from condconv_surgery.training.batches.loaders import Data, TrainAndVal, input_spec, open_data
from condconv_surgery.training.batches.unreadable_images import UnreadableImages
from condconv_surgery.training.classifier_heads import fit_heads, probability_notes
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.evaluation import score
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.monitor.callback import Callback
from condconv_surgery.training.monitor.expert_use import ExpertUse, without_effect
from condconv_surgery.training.monitor.run_metrics import Meter, temperature_of
from condconv_surgery.training.monitor.run_summary import start_lines
from condconv_surgery.training.monitor.training_curves import draw_curves
from condconv_surgery.training.monitor.unused_options import unused_options
from condconv_surgery.training.state.progress import Progress, TrainingResult
from condconv_surgery.training.state.resume import METRICS, RECIPE, cut_metrics, require_fresh, require_same_run
from condconv_surgery.training.state.run_files import (
    copy_file,
    failing_resumably,
    make_folder,
    read_rows,
    write_rows,
    write_text,
)
from condconv_surgery.training.state.run_state import load_state, save_state
from condconv_surgery.training.state.stop_signals import StopRequest
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
        images: TrainAndVal | None = None,
    ) -> None:
        self.options, self.world, self.request, self.callback = options, world, request, callback
        self.folder = Path(options.output)
        self.spec = spec = input_spec(model, options)
        self.data: Data = open_data(options, spec, world, images)
        before = (recipe_of(model) or Recipe()).classes
        with seeded(options.seed, "head"):
            self.heads = fit_heads(model, self.data.train.classes, spec)
        self.model_notes = probability_notes(model, spec)
        reason = why_not_alone(model)
        if reason:
            self.model_notes.append(f"The files of this run need load(path, model=MyNet()): {reason}.")
        self.learner = Learner(model, options, world, self.data.train.counts(), self.heads)
        self.renamed = before if before and before != self.data.train.classes and not self.heads else ()
        self.black = torch.zeros(1, spec.channels, spec.height, spec.width, device=world.device)
        self.unreadable = UnreadableImages(options.data.max_bad, world=world, note=callback.note)
        self.progress = Progress()
        self.uses: dict[str, ExpertUse] = {}
        self.meter = Meter(world.device, options.schedule.epochs, self.data.order.steps)

    def begin(self, resume: bool) -> None:
        """Create the folder, or restore the state in it."""
        if self.world.is_first:
            make_folder(self.folder)
        self.world.barrier()
        if not resume:
            require_fresh(self.folder)
        state, trouble = load_state(self.folder) if resume else (None, "")
        if trouble:
            self.callback.note(f"{trouble} Resuming from the previous state.")
        if state is not None:
            require_same_run(state, self.options, self.fingerprint(), self.world.size)
            self.learner.restore(state)
            self.progress = Progress.from_dict(state.facts["progress"])
            self.unreadable.names = list(state.facts.get("unreadable", []))
            self.callback.note(f"Resuming after step {self.progress.step}, epoch {self.progress.epochs_done}.")
            if state.facts["options"]["schedule"]["epochs"] != self.options.schedule.epochs:
                self.callback.note(
                    "The number of epochs has changed: learning rate and temperature follow the new length."
                )
        self.world.barrier()  # every process has read the state before rank 0 writes
        if self.world.is_first:
            write_text(self.folder / RECIPE, to_toml(self.options))
            cut_metrics(self.folder, self.progress.epochs_done)
        if self.data.divided is not None:
            report_check(self.data.divided, self.folder, self.unreadable, self.callback, self.world)
        for name, width in self.heads.items():
            self.callback.note(f"New head {name}: {width} classes.")
        if self.renamed:
            self.callback.note(
                f"The head is kept for the same number of classes; they were called {', '.join(self.renamed[:4])}, ..."
            )
        for line in (*self.model_notes, *unused_options(self.learner.model, self.options)):
            self.callback.note(line)
        self.callback.begin(start_lines(self.learner.model, self.options, self.spec, self.data.order, self.world))

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
        if self.world.is_first:
            draw_curves(read_rows(self.folder / METRICS), self.folder / CURVES)
        return self.result()

    def advance(self, batches: Iterator[Batch]) -> bool:
        """One step, the exchange between processes, and a saved state where one is due; true: the run stops."""
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
                    f"No image of a batch can be read: {', '.join(batch.unreadable[:3])}, ...",
                    "Unreadable images are replaced by others of their batch or set.",
                    "repair or remove them",
                )
        tally = self.learner.step(step_batches, progress.step, order.steps)
        progress.step += 1
        progress.tally = progress.tally + tally
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
        progress = self.progress
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
        self.save()
        self.callback.epoch(row)
        self.meter.restart()

    def evaluate(self) -> Tally | None:
        """Score the validation images; ``None`` when the run is to stop."""
        scored = score(
            self.learner, self.data.val_loader, self.black, self.unreadable, self.request, self.progress.step
        )
        if scored is None:
            return None
        scores, self.uses = scored
        self.callback.gates(self.progress.epochs_done + 1, self.uses)
        return scores

    def save(self) -> None:
        """Write the state, from rank 0; every process has the same weights, or a part of them."""
        if not self.world.is_first and not self.options.engine.shard:
            return
        facts = {
            "progress": self.progress.to_dict(),
            "options": self.options.to_dict(),
            "fingerprint": self.fingerprint(),
            "processes": self.world.size,
            "unreadable": self.unreadable.names,
        }
        state = self.learner.state(facts)
        if self.world.is_first:
            save_state(self.folder, state)

    def fingerprint(self) -> str:
        """Hash of the training and the validation images."""
        return f"{self.data.train.fingerprint()} {self.data.val.fingerprint()}"

    def patience_is_over(self) -> bool:
        """True after ``early_stop`` epochs without a better top-1."""
        patience = self.options.schedule.early_stop
        return bool(patience) and self.progress.epochs_done - self.progress.best_epoch >= patience

    def stopped(self) -> TrainingResult:
        """Save the state and report how to resume."""
        self.save()
        self.callback.note(
            f'Stopped after step {self.progress.step}; state saved. Resume with output="{self.folder}", resume=True.'
        )
        return self.result()

    def result(self) -> TrainingResult:
        rows = read_rows(self.folder / METRICS)
        last = rows[-1] if rows else {}
        return TrainingResult(
            output=str(self.folder),
            epochs=self.progress.epochs_done,
            steps=self.progress.step,
            train_images=len(self.data.train),
            val_images=len(self.data.val),
            classes=self.data.train.classes,
            heads=self.heads,
            top1=last.get("val_top1"),
            loss=last.get("val_loss"),
            best_top1=self.progress.best_top1 if self.progress.best_epoch else None,
            best_epoch=self.progress.best_epoch,
            unreadable=tuple(self.unreadable.names),
            stopped_by=int(self.request.signal),
        )
