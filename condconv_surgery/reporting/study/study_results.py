"""The results of a study, from its record: a row for each arm, the verdict in one sentence, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from condconv_surgery.recipe.study_record import ArmCost, ArmRecord, StudyRecord
from condconv_surgery.reporting.study.paired_difference import Difference, difference_of


@dataclass(frozen=True)
class ArmResult:
    """An arm's test accuracy over its seeds and its difference to the baseline (``None`` for the baseline itself)."""

    record: ArmRecord
    difference: Difference | None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def top1(self) -> float:
        """Mean over the seeds, 0 to 1."""
        return sum(run.top1 for run in self.record.runs) / len(self.record.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation of top-1 over the seeds; ``None`` with one seed."""
        count = len(self.record.runs)
        if count < 2:
            return None
        return float((sum((run.top1 - self.top1) ** 2 for run in self.record.runs) / (count - 1)) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "top1": self.top1,
            "spread": self.spread,
            "difference": self.difference and self.difference.to_dict(),
        }


@dataclass(frozen=True)
class StudyResults:
    """``arms`` in the study's order. winner: the arm to convert with, ``""`` for none. verdict: one sentence, or two
    where several arms gain. notes: what the intervals cover, and what may limit the result."""

    arms: tuple[ArmResult, ...]
    winner: str
    verdict: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "winner": self.winner,
            "arms": [arm.to_dict() for arm in self.arms],
            "notes": list(self.notes),
        }


def results_of(record: StudyRecord) -> StudyResults:
    """The results of the arms that have scored runs."""
    baseline = record.arm(record.baseline)
    scored = [arm for arm in record.arms if arm.runs]
    if not baseline.runs or len(scored) < 2:
        return StudyResults((), "", "The study has no result yet.", ())
    arms = tuple(ArmResult(arm, None if arm is baseline else difference_of(arm, baseline)) for arm in scored)
    verdict, winner = _verdict(record, arms)
    return StudyResults(arms, winner, verdict, tuple(_notes(record, arms)))


def points(found: Difference) -> str:
    """``+1.8 ± 0.4``: percentage points, with a second decimal where the interval needs it."""
    decimals = 1 if 100 * found.half >= 0.095 else 2
    return f"{100 * found.mean:+.{decimals}f} ± {100 * found.half:.{decimals}f}"


def macs_change(cost: ArmCost, baseline: ArmCost) -> float | None:
    """Relative change of MACs, 0.03 for 3% more."""
    return cost.macs / baseline.macs - 1 if cost.macs and baseline.macs else None


def step_ratio(cost: ArmCost, baseline: ArmCost) -> float | None:
    """Time of a training step relative to the baseline's."""
    return cost.step_seconds / baseline.step_seconds if cost.step_seconds and baseline.step_seconds else None


def _verdict(record: StudyRecord, arms: tuple[ArmResult, ...]) -> tuple[str, str]:
    compared = [(arm, arm.difference) for arm in arms if arm.difference is not None]
    gains = sorted((pair for pair in compared if pair[1].low > 0), key=lambda pair: -pair[1].low)
    if not gains:
        best, found = max(compared, key=lambda pair: pair[1].mean)
        reason = "No arm is better" if found.high < 0 else "No evidence of a gain"
        which = f"{best.name}, the best other arm" if len(compared) > 1 else best.name
        return f"{reason}: keep the {record.baseline} network ({which}: {points(found)} points).", ""
    best, found = gains[0]
    sentence = f"{points(found)} points{_at_cost(best.record.cost, record.arm(record.baseline).cost)}: "
    sentence += f"convert with {best.name}."
    if len(gains) > 1:
        other, other_found = gains[1]
        between = difference_of(best.record, other.record)
        clear = "is clear" if between.low > 0 else "is no evidence that one is better"
        sentence += (
            f" Next is {other.name} with {points(other_found)}; the difference between the two, {points(between)}, "
            f"{clear}."
        )
    return sentence, best.name


def _at_cost(cost: ArmCost, baseline: ArmCost) -> str:
    change = macs_change(cost, baseline)
    parts = [f"{round(100 * change) or 0:+d}% MACs"] if change is not None else []
    parts += [f"{cost.latency_ratio:.1f}x latency"] if cost.latency_ratio is not None else []
    return f" at {' and '.join(parts)}" if parts else ""


def _notes(record: StudyRecord, arms: tuple[ArmResult, ...]) -> list[str]:
    found = next(arm.difference for arm in arms if arm.difference is not None)
    each = "; each holds for its own arm, not for all at once" if len(arms) > 2 else ""
    if found.seeds == 1:
        covered = f"over {found.images} test images only: with one seed, what another seed would give is not known"
    else:
        covered = f"over {found.seeds} seeds and {found.images} test images"
    notes = [f"Intervals are of 95%, {covered}{each}."]
    seeds = {len(arm.record.runs) for arm in arms}
    if len(seeds) > 1 or len(arms) < len(record.arms):
        notes.append("The study is not complete: some runs are missing.")
    for arm in arms:
        rates = sorted(run.lr for run in arm.record.search)
        if len(rates) > 1 and arm.record.lr in (rates[0], rates[-1]):
            side = "smallest" if arm.record.lr == rates[0] else "largest"
            notes.append(f"{arm.name}: the {side} learning rate tried, {arm.record.lr:g}, was best; search further.")
    return notes
