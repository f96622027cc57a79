"""One run of one arm: train it, and score its best epoch on the test part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.data.three_parts import ThreeParts
from condconv_surgery.errors import DivergedError, TrainingError, counted
from condconv_surgery.models.artifact.save_load import load
from condconv_surgery.recipe.study_arms import Arm
from condconv_surgery.recipe.study_record import ArmRecord, ScoredRun, SearchRun
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.studies.arm_models import ArmModels, arm_options
from condconv_surgery.studies.image_scores import correct_images
from condconv_surgery.studies.study_folder import remove_states
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.finetuning import train_run
from condconv_surgery.training.monitor.callback import Callback
from condconv_surgery.training.state.progress import TrainingResult
from condconv_surgery.training.state.resume import METRICS
from condconv_surgery.training.state.run_files import read_rows
from condconv_surgery.training.state.stop_signals import StopRequest


@dataclass(frozen=True)
class PlannedRun:
    """search: it only chooses the learning rate, and is not scored on the test part."""

    arm: Arm
    lr: float
    seed: int
    epochs: int
    search: bool = False

    def __str__(self) -> str:
        length = counted(self.epochs, "epoch")
        why = ", to choose the rate" if self.search else ""
        return f"{self.arm.name}, learning rate {self.lr:g}, seed {self.seed}, {length}{why}"


class ArmRuns:
    """Trains and scores the runs of a study in the folder ``runs`` of its output."""

    def __init__(
        self,
        models: ArmModels,
        parts: ThreeParts,
        training: TrainingOptions,
        world: World,
        request: StopRequest,
        display: Callable[[], Callback],
    ) -> None:
        self.models, self.parts, self.training = models, parts, training
        self.world, self.request, self.display = world, request, display

    def run(self, planned: PlannedRun, row: ArmRecord) -> ArmRecord | None:
        """``row`` with the run added; ``None`` when it was stopped by a signal. An interrupted run is resumed."""
        if self._stopping():
            return None
        options = self.options(planned)
        model, images = self.models.make(planned.arm, planned.seed), (self.parts.train, self.parts.val)
        callback = self.display() if self.world.is_first else Callback()
        try:
            result = train_run(model, options, self.world, self.request, callback, resume=True, images=images)
        except DivergedError:
            if not planned.search:
                raise
            return replace(row, search=(*row.search, SearchRun(planned.lr)))
        if not is_over(result, options):
            return None
        found = self._found(Path(options.output))
        if planned.search:
            return replace(row, search=(*row.search, SearchRun(planned.lr, **found)))
        correct = correct_images(self.trained(planned), self.parts.test, options, self.world)
        del found["val_loss"]
        scored = ScoredRun(planned.seed, correct, planned.lr, result.epochs, result.steps, **found)
        return replace(row, runs=(*row.runs, scored))

    def options(self, planned: PlannedRun) -> TrainingOptions:
        """The options of one run."""
        name = f"{planned.arm.slug}-{planned.lr:g}-{planned.seed}"
        return arm_options(planned.arm, self.training).updated(
            {
                "seed": planned.seed,
                "output": str(Path(self.training.output) / "runs" / name),
                "optimizer": {"lr": planned.lr},
                "schedule": {"epochs": planned.epochs},
            }
        )

    def trained(self, planned: PlannedRun) -> nn.Module:
        """The model of the run's best epoch."""
        best = Path(self.options(planned).output) / "best.safetensors"
        return load(best, model=copy.deepcopy(self.models.original), trust=self.training.trust)

    def clean(self, planned: PlannedRun) -> None:
        """Remove the files that a recorded run no longer needs."""
        self.world.barrier()
        if self.world.is_first:
            folder = Path(self.options(planned).output)
            remove_states(folder)
            if planned.search:
                (folder / "best.safetensors").unlink(missing_ok=True)

    def _found(self, folder: Path) -> dict[str, Any]:
        """Validation scores of the best epoch and the time of all, as the first process has written them."""
        found: dict[str, Any] = {}
        if self.world.is_first:
            rows = read_rows(folder / METRICS)
            best = next(row for row in reversed(rows) if row["best"])
            found = {"val_top1": best["val_top1"], "val_loss": best["val_loss"], "best_epoch": best["epoch"]}
            found["seconds"] = sum(row["seconds"] for row in rows)
        return self.world.gather(found)[0]

    def _stopping(self) -> bool:
        return bool(self.world.sum([float(bool(self.request))])[0])


def best_rate(row: ArmRecord) -> float:
    """The rate with the best validation top-1, of equal ones with the smaller loss. Raises ``TrainingError``."""
    usable = [run for run in row.search if run.val_top1 is not None]
    if not usable:
        rates = ", ".join(f"{run.lr:g}" for run in row.search)
        raise TrainingError(
            f"{row.name} diverged at each learning rate: {rates}.",
            "At least one must train.",
            f"a new study with optimizer.lr={min(run.lr for run in row.search) / 10:.2g}",
        )
    return max(usable, key=lambda run: (run.val_top1 or 0.0, -(run.val_loss or 0.0))).lr


def is_over(result: TrainingResult, options: TrainingOptions) -> bool:
    """Was the run completed, by its last epoch or by early stopping?"""
    patience = options.schedule.early_stop
    return result.epochs >= options.schedule.epochs or bool(patience and result.epochs - result.best_epoch >= patience)
