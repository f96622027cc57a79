"""Plot loss and top-1 over the epochs of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from condconv_surgery.models.artifact.atomic_write import replacing


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows of ``metrics.jsonl`` as a PNG: loss at the left, top-1 at the right, train and validation.

    Raises ``InputError`` when the file cannot be written; one that was there before is unchanged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here: it takes half a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in rows]
    for position, (what, label) in enumerate((("loss", "loss, nats per image"), ("top1", "top-1")), start=1):
        axes = figure.add_subplot(1, 2, position)
        for part, style in (("train", "--"), ("val", "-")):
            axes.plot(epochs, [row[f"{part}_{what}"] for row in rows], style, marker=".", label=part)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
