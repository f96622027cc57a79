"""The record of a study: every run of every arm, image by image. JSON in and out; no torch.

``compare`` writes it. A loop of your own can make one as well, for any task that scores the same images in each run::

    runs = tuple(ScoredRun(seed, correct) for seed, correct in enumerate(["0110", "0111"]))
    record = StudyRecord("my task", (ArmRecord("static", runs), ArmRecord("condconv:4", other_runs)))
    StudyReport(record).write("study")       # condconv_surgery.reporting: statistics, verdict, table, plot, page
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from condconv_surgery.errors import DamagedFileError, InputError

STUDY_FORMAT = 1
"""Version of the record's JSON. Reading a larger one raises."""


@dataclass(frozen=True)
class ArmCost:
    """What an arm costs; ``None`` where it was not measured.

    macs: of one image. step_seconds: median time of a training step, without reading images. latency: seconds of one
    image in eval mode. latency_ratio: relative to the baseline, measured alternately.
    """

    parameters: int | None = None
    macs: int | None = None
    step_seconds: float | None = None
    latency: float | None = None
    latency_ratio: float | None = None


@dataclass(frozen=True)
class SearchRun:
    """One run of the learning-rate search. Validation scores of its best epoch; ``None``: the run diverged."""

    lr: float
    val_top1: float | None = None
    val_loss: float | None = None
    best_epoch: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ScoredRun:
    """One run, scored once on the test images.

    correct: a digit for each test image, in the same order in all runs of the study: 1 right, 0 wrong.
    """

    seed: int
    correct: str
    lr: float | None = None
    epochs: int | None = None
    steps: int | None = None
    best_epoch: int | None = None
    val_top1: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.correct, str) or not self.correct or set(self.correct) - {"0", "1"}:
            raise InputError(
                f"correct is {self.correct!r:.60} in the run with seed {self.seed}.",
                "It is a text with a digit for each test image: 1 right, 0 wrong.",
                'correct="0110"',
            )

    @property
    def top1(self) -> float:
        """Share of correct test images, 0 to 1."""
        return self.correct.count("1") / len(self.correct)


@dataclass(frozen=True)
class ArmRecord:
    """One arm: ``name`` as in tables, its scored runs, its learning-rate search and its cost.

    epochs: of each run. lr: the rate that was chosen.
    """

    name: str
    runs: tuple[ScoredRun, ...] = ()
    search: tuple[SearchRun, ...] = ()
    cost: ArmCost = field(default_factory=ArmCost)
    epochs: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        seeds = [run.seed for run in self.runs]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{self.name} has two runs with one seed.", "Each run has its own seed.", "seed=1")

    def run(self, seed: int) -> ScoredRun | None:
        """The run with this seed."""
        return next((run for run in self.runs if run.seed == seed), None)


@dataclass(frozen=True)
class StudyRecord:
    """Arms that were trained alike and scored on the same images.

    baseline: the arm that the others are compared with, by default the first. protocol: sentences that say what was
    done. settings: what must be equal for a study to be continued. environment: hardware and versions.
    """

    title: str
    arms: tuple[ArmRecord, ...]
    baseline: str = ""
    protocol: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"A study of the arms {', '.join(names) or '(none)'}.",
                "It has at least one arm, and each has a name of its own.",
                'StudyRecord("title", (ArmRecord("static", runs), ArmRecord("condconv:4", runs)))',
            )
        if not self.baseline:
            object.__setattr__(self, "baseline", names[0])
        if self.baseline not in names:
            raise InputError(
                f"The baseline {self.baseline!r} is not an arm.", f"The arms: {', '.join(names)}.", "baseline=..."
            )
        sizes = {len(run.correct) for arm in self.arms for run in arm.runs}
        if len(sizes) > 1:
            raise InputError(
                f"The runs were scored on {' and '.join(map(str, sorted(sizes)))} images.",
                "All runs of a study are scored on the same images, in the same order.",
                "score each model on one list of images",
            )

    def arm(self, name: str) -> ArmRecord:
        """The arm with this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def with_arm(self, arm: ArmRecord) -> StudyRecord:
        """A copy in which ``arm`` replaces the one of its name."""
        return replace(self, arms=tuple(arm if other.name == arm.name else other for other in self.arms))

    def to_dict(self) -> dict[str, Any]:
        return {"format": STUDY_FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StudyRecord:
        """The inverse of ``to_dict``, also after JSON. Raises ``DamagedFileError``."""
        try:
            version = data["format"]
            if not isinstance(version, int) or version > STUDY_FORMAT:
                raise DamagedFileError(
                    f"The study has format {version!r}.",
                    f"This version of condconv-surgery reads formats up to {STUDY_FORMAT}.",
                    "pip install --upgrade condconv-surgery",
                )
            return cls(
                title=str(data["title"]),
                arms=tuple(_arm(row) for row in data["arms"]),
                baseline=str(data["baseline"]),
                protocol=tuple(map(str, data["protocol"])),
                settings=dict(data["settings"]),
                environment={str(name): str(value) for name, value in data["environment"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedFileError(
                f"The study cannot be read: {type(error).__name__}: {error}.",
                "It is the JSON that compare or StudyReport.write writes.",
                "another folder for a new study",
            ) from error


def _arm(row: dict[str, Any]) -> ArmRecord:
    return ArmRecord(
        name=str(row["name"]),
        runs=tuple(ScoredRun(**run) for run in row["runs"]),
        search=tuple(SearchRun(**run) for run in row["search"]),
        cost=ArmCost(**row["cost"]),
        epochs=row["epochs"],
        lr=row["lr"],
    )
