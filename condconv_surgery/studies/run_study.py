"""``compare``: train the arms of a study alike and say whether conversion pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.data.data_check import BEFORE_A_RUN, describe
from condconv_surgery.data.find_data import DividedData
from condconv_surgery.recipe.study_arms import DEFAULT_ARMS, Arm, parse_arms
from condconv_surgery.recipe.study_options import StudyOptions, rates_around
from condconv_surgery.recipe.study_record import ArmCost, ArmRecord, StudyRecord
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.reporting.study_report import StudyReport
from condconv_surgery.studies.arm_costs import with_costs
from condconv_surgery.studies.arm_models import ArmModels, arm_options
from condconv_surgery.studies.arm_runs import ArmRuns, PlannedRun, best_rate
from condconv_surgery.studies.step_times import epochs_in_equal_time, measure_step_seconds
from condconv_surgery.studies.study_folder import read_record, require_same_study, write_record
from condconv_surgery.studies.study_inputs import StudyInputs, study_inputs
from condconv_surgery.studies.study_settings import environment, protocol, settings_of
from condconv_surgery.training.batches.check_before_run import write_check
from condconv_surgery.training.batches.loaders import input_spec
from condconv_surgery.training.distributed.world import World, open_world
from condconv_surgery.training.monitor.callback import Callback
from condconv_surgery.training.monitor.progress_display import BestEpoch, console_display
from condconv_surgery.training.state.run_files import make_folder
from condconv_surgery.training.state.stop_signals import StopRequest, catch_signals

Display = Callable[[], Callback]


def compare(
    model: nn.Module | str | Path,
    arms: Sequence[str | Arm] = DEFAULT_ARMS,
    options: TrainingOptions | Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    seeds: int = 3,
    budget: str = "steps",
    rates: int = 3,
    display: Display | None = None,
    progress: bool = True,
) -> StudyReport:
    """Does conversion pay? Train every arm alike, and return differences with 95% intervals, costs and a verdict.

        import condconv_surgery as cs
        study = cs.compare("resnet18.pt", ["static", "condconv:4"], data="photos", output="study")
        print(study.verdict)

    model: an unconverted network, as for ``finetune``; a module is not changed.
    arms: ``static``, ``condconv:4``, ``odconv:1,include=layer4.*``, ...; see ``parse_arm``. The first static one is the
        baseline.
    options: of training, for all arms, as for ``finetune``. ``optimizer.lr`` is the middle of the search.
    data: images in three parts (``find_three_parts``): runs train on the first; the second chooses learning rate and
        epoch; each run is scored once on the third.
    output: the study's folder: ``study.json``, ``.md``, ``.png`` and ``.html``, ``data.json`` and ``runs/``.
    seeds: scored runs of each arm, at the rate that was best for it in a search with a seed of its own.
    budget: ``"steps"`` or ``"time"`` (``StudyOptions``). rates: learning rates tried for each arm.
    display: makes the callback of each run. Default: with ``progress`` a bar or lines on stderr, else none.

    The same call continues a study that was interrupted, and gives the same record. On a signal it returns early; the
    report is then not ``complete``.

    Raises ``InputError`` for what cannot be compared and for a folder with another study; else what ``finetune`` and
    ``convert`` raise.
    """
    study_options = StudyOptions(parse_arms(arms), seeds, budget, rates)
    given = study_inputs(model, options, data, output)
    with open_world() as world, catch_signals() as request:
        return Study(given, study_options, world, request, display or display_of_runs(progress)).run()


def display_of_runs(progress: bool) -> Display:
    """What shows each run of a study; nothing without ``progress``."""
    return (lambda: BestEpoch(console_display())) if progress else Callback


class Study:
    """The runs of a study, in order; ``record`` has those that are done."""

    def __init__(
        self,
        given: StudyInputs,
        options: StudyOptions,
        world: World,
        request: StopRequest,
        display: Display,
    ) -> None:
        self.options, self.training, self.parts = options, given.training, given.parts
        self.world, self.request = world, request
        original, training, parts = given.original, given.training, given.parts
        self.folder, self.note = Path(training.output), display().note if world.is_first else Callback().note
        self.models = ArmModels(original, parts.train, input_spec(original, training))
        self.runs = ArmRuns(self.models, parts, training, world, request, display)
        self.settings = settings_of(original, options, training, parts)
        self.record = self._begin()

    def run(self) -> StudyReport:
        """All runs that are missing, then the costs and the files."""
        total = len(self.options.arms) * (self.options.seeds + (self.options.rates if self.options.rates > 1 else 0))
        if self.world.is_first:
            found = describe(DividedData(self.parts.train, self.parts.val, self.parts.origin), BEFORE_A_RUN)
            write_check(found, self.folder, self.note)
        for planned in self._missing():
            done = sum(len(arm.runs) + len(arm.search) for arm in self.record.arms)
            self.note(f"Run {done + 1} of {total}: {planned}")
            row = self.runs.run(planned, self.record.arm(planned.arm.name))
            if row is None:
                self.note("Stopped; everything so far is saved. The same call continues the study.")
                return StudyReport(self.record, stopped_by=self.request.number)
            self._keep(self.record.with_arm(row))
            self.runs.clean(planned)
        if self.world.is_first:
            self.note("Measuring parameters, MACs and latency of the arms ...")
            self.record = with_costs(self.record, self._trained)
            StudyReport(self.record).write(self.folder)
        self.world.barrier()
        return StudyReport(self.record)

    def _begin(self) -> StudyRecord:
        """The record in the folder if it is of this study, else a new one."""
        before = read_record(self.folder)
        self.world.barrier()  # every process has looked
        if before is not None:
            require_same_study(before, self.settings, self.folder)
            self.note(f"Continuing the study in {self.folder}.")
            return replace(before, settings=self.settings, protocol=self._protocol(before))
        if self.world.is_first:
            make_folder(self.folder)
        self.note("Converting, and measuring the time of a training step of each arm ...")
        seconds = self._step_seconds()
        epochs = dict.fromkeys(seconds, self.training.schedule.epochs)
        if self.options.budget == "time":
            epochs = epochs_in_equal_time(seconds, self.training.schedule.epochs)
        rows = tuple(
            ArmRecord(arm.name, cost=ArmCost(step_seconds=seconds[arm.name]), epochs=epochs[arm.name])
            for arm in self.options.arms
        )
        title, baseline = self.training.model or type(self.models.original).__name__, self.options.baseline.name
        record = StudyRecord(title, rows, baseline, (), self.settings, environment(self.world, self.models.spec))
        self._keep(replace(record, protocol=self._protocol(record)))
        return self.record

    def _protocol(self, record: StudyRecord) -> tuple[str, ...]:
        return protocol(self.options, self.training, self.parts, record)

    def _step_seconds(self) -> dict[str, float]:
        seed = self.training.seed
        arms = {arm.name: (self.models.make(arm, seed), arm_options(arm, self.training)) for arm in self.options.arms}
        return measure_step_seconds(arms, (self.parts.train, self.parts.val), self.world)

    def _missing(self) -> Iterator[PlannedRun]:
        """The runs that the record lacks: the search of each arm, then seed by seed all arms."""
        seed, seeds = self.training.seed, range(1, self.options.seeds + 1)
        for arm in self.options.arms:
            row, middle = self.record.arm(arm.name), arm_options(arm, self.training).optimizer.lr
            rates = rates_around(middle, self.options.rates)
            for lr in rates if len(rates) > 1 else []:
                if all(run.lr != lr for run in row.search):
                    yield PlannedRun(arm, lr, seed, row.epochs or 1, search=True)
            row = self.record.arm(arm.name)
            if row.lr is None:
                self._keep(self.record.with_arm(replace(row, lr=best_rate(row) if row.search else middle)))
        for number in seeds:
            for arm in self.options.arms:
                row = self.record.arm(arm.name)
                if row.run(seed + number) is None and row.lr is not None:
                    yield PlannedRun(arm, row.lr, seed + number, row.epochs or 1)

    def _trained(self, row: ArmRecord) -> nn.Module:
        """The network of the first scored run of an arm."""
        arm, first = next(arm for arm in self.options.arms if arm.name == row.name), row.runs[0]
        planned = PlannedRun(arm, first.lr or 0.0, first.seed, first.epochs or 1)
        return self.runs.trained(planned).to(self.world.device)

    def _keep(self, record: StudyRecord) -> None:
        self.record = record
        if self.world.is_first:
            write_record(self.folder, record)
