"""A whole training run, read from top to bottom: prepare, restore, train, score, save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.save_load import recipe_of, save
from condconv_surgery.recipe import Recipe
from condconv_surgery.recipe.toml_text import to_toml
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.seeding import seeded
from condconv_surgery.training.batch_norm import recalibrate
from condconv_surgery.training.batches.loaders import Data, input_spec, open_data
from condconv_surgery.training.batches.unreadable_images import Unreadable
from condconv_surgery.training.classifier_heads import fit_heads
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.monitor.meter import Meter, temperature_of
from condconv_surgery.training.monitor.progress_display import Watcher
from condconv_surgery.training.monitor.training_curves import draw_curves
from condconv_surgery.training.monitor.unused_options import idle_options
from condconv_surgery.training.scoring import score
from condconv_surgery.training.state.progress import Progress, TrainingResult
from condconv_surgery.training.state.resume import METRICS, RECIPE, cut_metrics, require_fresh, require_same_run
from condconv_surgery.training.state.run_files import copy_file, keeping, make_folder, read_rows, write_rows, write_text
from condconv_surgery.training.state.run_state import load_state, save_state
from condconv_surgery.training.state.stop_signals import StopWish
from condconv_surgery.training.tally import Tally

CURVES = "curves.png"
RECALIBRATION_BATCHES = 100


class Run:
    """The parts of a run and where it stands."""

    def __init__(
        self, model: nn.Module, options: TrainingOptions, world: World, wish: StopWish, watcher: Watcher
    ) -> None:
        self.options, self.world, self.wish, self.watcher = options, world, wish, watcher
        self.folder = Path(options.output)
        spec = input_spec(model, options)
        self.data: Data = open_data(options, spec, world)
        before = (recipe_of(model) or Recipe()).classes
        with seeded(options.seed, "head"):
            self.heads = fit_heads(model, self.data.train.classes, spec)
        self.learner = Learner(model, options, world, self.data.train.counts(), self.heads)
        self.renamed = before if before and before != self.data.train.classes and not self.heads else ()
        self.black = torch.zeros(1, spec.channels, spec.height, spec.width, device=world.device)
        self.unreadable = Unreadable(options.data.max_bad, world=world, note=watcher.note)
        self.progress = Progress()
        self.meter = Meter(world.device, options.schedule.epochs, self.data.order.steps)

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
            require_same_run(state, self.options, self.fingerprint(), self.world.size)
            self.learner.restore(state)
            self.progress = Progress.from_dict(state.facts["progress"])
            self.unreadable.names = list(state.facts.get("unreadable", []))
            self.watcher.note(f"Going on after step {self.progress.step}, epoch {self.progress.epochs_done}.")
            if state.facts["options"]["schedule"]["epochs"] != self.options.schedule.epochs:
                self.watcher.note("The number of epochs is another: rate and temperature follow the new length.")
        self.world.wait()  # every process has read the state before rank 0 writes
        if self.world.speaks:
            write_text(self.folder / RECIPE, to_toml(self.options))
            cut_metrics(self.folder, self.progress.epochs_done)
        self.note_head()
        for line in idle_options(self.learner.model, self.options):
            self.watcher.note(line)

    def note_head(self) -> None:
        """Say what became of the last layer."""
        for name, width in self.heads.items():
            self.watcher.note(f"New head {name}: {width} classes.")
        if self.renamed:
            self.watcher.note(
                f"The head is kept, for there are as many classes; they were called {', '.join(self.renamed[:4])}, ..."
            )

    def close(self) -> None:
        """End the readers, the lines and the hooks; each, even if another fails."""
        with ExitStack() as stack:
            for close in (self.learner.close, self.watcher.close, self.data.close):
                stack.callback(close)

    def train(self) -> TrainingResult:
        """Epoch after epoch, until the end or a wish to stop."""
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
        if self.world.speaks:
            draw_curves(read_rows(self.folder / METRICS), self.folder / CURVES)
        return self.result()

    def advance(self, batches: Iterator[Batch]) -> bool:
        """One step, what the processes tell each other after it, and a state where one is due; true: the run stops."""
        self.step(batches)
        stops, met = self.world.sum([float(bool(self.wish)), float(len(self.unreadable.waiting))])
        if met:
            self.unreadable.share()
        if not stops and self.progress.step % self.options.engine.save_every == 0:
            self.save()
        return bool(stops)

    def step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step."""
        progress, order = self.progress, self.data.order
        taken = list(islice(batches, order.accumulate))
        for batch in taken:
            self.unreadable.meet(batch.unreadable)
            if not len(batch.labels):
                raise InputError(
                    f"No image of a batch can be read: {', '.join(batch.unreadable[:3])}, ...",
                    "Unreadable images are replaced by others of their batch or set.",
                    "mend or remove them",
                )
        tally = self.learner.step(taken, progress.step, order.steps)
        progress.step += 1
        progress.tally = progress.tally + tally
        images = sum(len(batch.labels) for batch in taken) * self.world.size
        self.meter.count(0 if self.learner.skipped else images)
        self.watcher.step(self.meter.view(progress, self.learner.lr))

    def finish_statistics(self) -> None:
        """After the last step, measure batch-norm statistics anew if the options ask for it."""
        last = self.progress.step == self.data.order.steps
        if last and self.options.layers.batch_norm == "recalibrate":
            batches = islice(self.data.batches_from(0), RECALIBRATION_BATCHES)
            norms = recalibrate(self.learner.scored, batches, world=self.world, cast=self.learner.cast)
            self.watcher.note(f"Measured the statistics of {norms} batch norms anew.")

    def end_epoch(self, scores: Tally) -> None:
        """Note the epoch's numbers, then save what they belong to."""
        progress = self.progress
        progress.epochs_done += 1
        best = scores.top1 > progress.best_top1
        if best:
            progress.best_top1, progress.best_epoch = scores.top1, progress.epochs_done
        model = self.learner.scored
        row = self.meter.row(progress, self.learner.lr, temperature_of(model), scores, best)
        progress.tally = Tally()
        finished = self.learner.to_save()
        if self.world.speaks and finished is not None:
            last = self.folder / "last.safetensors"
            with keeping(last):
                save(finished, last)
            if best:
                copy_file(last, self.folder / "best.safetensors")
            write_rows(self.folder / METRICS, [*read_rows(self.folder / METRICS), row.to_dict()])
        self.save()
        self.watcher.epoch(row)
        self.meter.restart()

    def evaluate(self) -> Tally | None:
        """Score the validation images; ``None`` when the run is to stop."""
        found = score(self.learner, self.data.val_loader, self.black, self.unreadable, self.wish, self.progress.step)
        if found is None:
            return None
        scores, uses = found
        self.watcher.gates(self.progress.epochs_done + 1, uses)
        return scores

    def save(self) -> None:
        """Write the state, from rank 0; every process has the same weights, or a part of them."""
        if not self.world.speaks and not self.options.engine.shard:
            return
        facts = {
            "progress": self.progress.to_dict(),
            "options": self.options.to_dict(),
            "fingerprint": self.fingerprint(),
            "processes": self.world.size,
            "unreadable": self.unreadable.names,
        }
        state = self.learner.state(facts)
        if self.world.speaks:
            save_state(self.folder, state)

    def fingerprint(self) -> str:
        """Of the training and the validation images."""
        return f"{self.data.train.fingerprint()} {self.data.val.fingerprint()}"

    def patience_is_over(self) -> bool:
        """No better top-1 for as many epochs as ``early_stop`` says."""
        patience = self.options.schedule.early_stop
        return bool(patience) and self.progress.epochs_done - self.progress.best_epoch >= patience

    def stopped(self) -> TrainingResult:
        """Save and say how to go on."""
        self.save()
        self.watcher.note(
            f"Stopped after step {self.progress.step}; state saved. Go on: condconv finetune -o {self.folder} --resume"
        )
        return self.result()

    def result(self) -> TrainingResult:
        """What the run has come to so far."""
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
            stopped_by=int(self.wish.signal),
        )
