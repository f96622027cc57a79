"""``docs/evidence.md`` and its figure, from the recorded studies under ``benchmarks/results``.

    python -m benchmarks.studies.evidence_page

Each study is a folder with the ``study.json`` that ``condconv compare`` or ``endless_study collect`` wrote. A test
holds the page to the records.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from condconv_surgery.recipe.study_record import StudyRecord
from condconv_surgery.reporting import StudyReport
from condconv_surgery.reporting.render.matplotlib_figures import make_figure, remove_frame
from condconv_surgery.reporting.render.number_format import human, percent
from condconv_surgery.reporting.render.plots import SERIES
from condconv_surgery.reporting.study.paired_difference import Difference, difference_of
from condconv_surgery.reporting.study.study_results import ArmResult, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
PAGE, FIGURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "images" / "evidence.png"
TEXT = Path(__file__).with_name("evidence.md")
"""The page without its table and what stands below each study."""


@dataclass(frozen=True)
class Evidence:
    """One study. name: of the task, short. longer: the arm that trains the static network for about the time of a
    converted one, ``""`` where there is none or the whole study has equal time. between: pairs of arms whose difference
    is stated too.
    """

    folder: str
    name: str
    longer: str = ""
    between: tuple[tuple[str, str], ...] = ()

    @cached_property
    def report(self) -> StudyReport:
        return StudyReport.read(ROOT / "benchmarks" / "results" / self.folder)

    @property
    def record(self) -> StudyRecord:
        return self.report.record

    @property
    def name_of_longer(self) -> str:
        """The arm that others are compared with at equal time."""
        return self.record.baseline if self.record.settings.get("budget") == "time" else self.longer

    def differences(self, arm: ArmResult) -> tuple[Difference | None, Difference | None]:
        """To the static network at equal steps, and at equal time; ``None`` where the study does not say."""
        if self.name_of_longer == self.record.baseline:
            return None, arm.difference
        if arm not in self.compared() or not self.longer or not self.record.arm(self.longer).runs:
            return arm.difference, None
        return arm.difference, difference_of(arm.record, self.record.arm(self.longer))

    def compared(self) -> list[ArmResult]:
        """The arms that are compared with the static network."""
        return [arm for arm in self.report.results.arms if arm.name not in (self.record.baseline, self.longer)]


STUDIES = (
    Evidence(
        "endless-emoji",
        "endless emoji",
        longer="static, twice the steps",
        between=(
            ("condconv:4", "condconv:4, noise"),
            ("condconv:4, classifier", "condconv:4"),
            ("odconv:1, classifier", "odconv:1"),
            ("odconv:4, sigmoid gates, hidden 64", "odconv:1"),
            ("odconv:4, sigmoid gates, hidden 64", "odconv:2, sigmoid gates, hidden 32, classifier"),
        ),
    ),
    Evidence("characters", "characters"),
    Evidence("emoji", "emoji, MobileNetV2"),
    Evidence("clip-art", "clip art, EfficientNet-Lite0"),
    Evidence("digits", "digits"),
)

HEADERS = ("set", "arm", "seeds", "parameters", "MACs", "top-1, %", "equal steps", "equal time")
BASELINE = "baseline"


def page(studies: tuple[Evidence, ...] = STUDIES) -> str:
    """The whole page, as Markdown."""
    protocols = "\n\n".join(f"## {_capital(study.name)}\n\n{_details(study)}" for study in studies)
    return TEXT.read_text(encoding="utf-8").replace("{table}", _table(studies)).replace("{protocols}", protocols)


def figure(studies: tuple[Evidence, ...] = STUDIES) -> Figure:
    """A row for each arm: its difference to the static network at equal steps and, hollow, at equal time."""
    rows = [(study, arm) for study in studies for arm in study.compared()]
    drawn = make_figure(8.0, 1.2 + 0.5 * len(rows))
    axes = drawn.subplots()
    for y, (study, arm) in enumerate(rows):
        colour = SERIES[1 + studies.index(study) % (len(SERIES) - 1)]
        for found, face, shift in zip(study.differences(arm), (colour, "none"), (0.0, 0.25), strict=True):
            if found is not None:
                axes.errorbar(
                    100 * found.mean, y + shift, xerr=100 * found.half, fmt="o", color=colour, mfc=face, capsize=3
                )
    axes.axvline(0, color=SERIES[0], linewidth=0.8, zorder=0)
    axes.set_yticks(
        range(len(rows)),
        [textwrap.fill(f"{study.name}: {arm.name}", 34, break_long_words=False) for study, arm in rows],
    )
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel("points of top-1 over static, 95%; hollow: equal time")
    remove_frame(axes)
    return drawn


def _table(studies: tuple[Evidence, ...]) -> str:
    lines = [HEADERS, *(row for study in studies for row in _rows(study))]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|---|---|" + "---:|" * (len(HEADERS) - 2), *body])


def _rows(study: Evidence) -> list[tuple[str, ...]]:
    static = study.record.arm(study.record.baseline).cost
    rows = []
    for arm in sorted(study.report.results.arms, key=lambda arm: arm.name not in (study.record.baseline, study.longer)):
        cost = arm.record.cost
        steps, time = ("" if found is None else points(found) for found in study.differences(arm))
        if arm.difference is None:
            steps = "" if study.name_of_longer == arm.name else BASELINE
        rows.append(
            (
                study.name if arm.difference is None else "",
                arm.name,
                str(len(arm.record.runs)),
                "" if cost.parameters is None else human(cost.parameters),
                _macs(cost.macs, static.macs),
                f"{100 * arm.top1:.1f}",
                steps,
                BASELINE if arm.name == study.name_of_longer else time,
            )
        )
    return rows


def _macs(macs: int | None, static: int | None) -> str:
    if not macs or not static:
        return ""
    return human(macs) if macs == static else percent(static, macs)


def _details(study: Evidence) -> str:
    record, report = study.record, study.report
    lines = [f"**{report.verdict}**", "\n".join(f"- {sentence}" for sentence in record.protocol)]
    done = {arm.name: arm for arm in record.arms if arm.runs}
    pairs = [pair for pair in study.between if set(pair) <= set(done)]
    lines += [f"{one} minus {other}: {points(difference_of(done[one], done[other]))} points." for one, other in pairs]
    rates = ", ".join(f"{arm.name} {arm.lr:g}" for arm in done.values() if arm.lr)
    lines.append(f"Learning rates chosen: {rates}. {' '.join(report.results.notes)}")
    lines.append(f"Environment: {', '.join(f'{name} {value}' for name, value in record.environment.items())}.")
    return "\n\n".join(lines)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    figure().savefig(FIGURE, format="png", dpi=110)
