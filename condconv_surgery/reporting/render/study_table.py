"""A study as a table in a terminal of 80 columns, and as Markdown."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from condconv_surgery.recipe.study_record import StudyRecord
from condconv_surgery.reporting.render.number_format import human, percent
from condconv_surgery.reporting.render.terminal import simple_table
from condconv_surgery.reporting.study.study_results import ArmResult, StudyResults, points, step_ratio

HEADERS = ("arm", "top-1, %", "difference", "params", "MACs", "latency", "step", "epochs", "rate")
KEY = (
    "top-1: on the test images, mean and standard deviation over the seeds. difference: points of top-1 to {baseline}, "
    "with its 95% interval. MACs, latency (one image), step (time of a training step): relative to {baseline}. rate: "
    "learning rate chosen."
)
NAME_WIDTH = 18


def study_rows(record: StudyRecord, results: StudyResults) -> list[list[str]]:
    """The cells under ``HEADERS``, a dash where something was not measured."""
    return [_row(record, arm) for arm in results.arms]


def columns_shown(rows: list[list[str]]) -> list[int]:
    """Indices of the columns in which something was measured."""
    return [i for i in range(len(HEADERS)) if i < 3 or any(row[i] != "-" for row in rows)]


def key_of(record: StudyRecord) -> str:
    """What the columns mean."""
    return KEY.format(baseline=record.baseline)


def render_study(record: StudyRecord, results: StudyResults) -> RenderableType:
    """Title, table, notes and the verdict last, where a reader of a terminal looks."""
    rows = study_rows(record, results)
    if not rows:
        return Text(results.verdict)
    shown = columns_shown(rows)
    cells: list[list[str | Text]] = [[row[i] for i in shown] for row in rows]
    for row, arm in zip(cells, results.arms, strict=True):
        name = str(row[0])
        name = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"
        row[0] = Text(name, style="bold" if arm.name == results.winner else "")
        row[2] = Text(str(row[2]), style=_style(arm))
    return Group(
        Text(record.title, style="bold"),
        Text(""),
        simple_table([(HEADERS[i], i != 0) for i in shown], cells, tight=True),
        Text(""),
        *(Text(note, style="dim") for note in (key_of(record), *results.notes)),
        Text(""),
        Text(results.verdict, style="bold"),
    )


def study_markdown(record: StudyRecord, results: StudyResults) -> str:
    """Verdict, table, notes, what was done, and the environment."""
    rows = study_rows(record, results)
    shown = columns_shown(rows)
    lines = [[row[i] for i in shown] for row in (HEADERS, *rows)]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    surroundings = ", ".join(f"{name} {value}" for name, value in record.environment.items())
    parts = [
        f"# {record.title}",
        f"**{results.verdict}**",
        "\n".join([head, "|---|" + "---:|" * (len(shown) - 1), *body]),
        "\n".join([key_of(record), *results.notes]),
        "\n".join(f"- {sentence}" for sentence in record.protocol),
        f"Environment: {surroundings}." if surroundings else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(record: StudyRecord, arm: ArmResult) -> list[str]:
    cost, baseline = arm.record.cost, record.arm(record.baseline).cost
    spread = "" if arm.spread is None else f" ±{100 * arm.spread:.1f}"
    step = step_ratio(cost, baseline)
    return [
        arm.name,
        f"{100 * arm.top1:.1f}{spread}",
        "baseline" if arm.difference is None else points(arm.difference),
        "-" if cost.parameters is None else human(cost.parameters),
        "-" if not cost.macs or not baseline.macs else _macs(cost.macs, baseline.macs, arm),
        "-" if cost.latency_ratio is None else f"{cost.latency_ratio:.2f}x",
        "-" if step is None else f"{step:.2f}x",
        "-" if arm.record.epochs is None else str(arm.record.epochs),
        "-" if arm.record.lr is None else f"{arm.record.lr:g}",
    ]


def _macs(macs: int, baseline: int, arm: ArmResult) -> str:
    return human(macs) if arm.difference is None else percent(baseline, macs)


def _style(arm: ArmResult) -> str:
    if arm.difference is None:
        return "dim"
    return "green" if arm.difference.low > 0 else "red" if arm.difference.high < 0 else ""
