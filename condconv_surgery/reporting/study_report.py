"""``StudyReport``: the record of a study with its statistics, and their output formats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.artifact.atomic_write import replacing
from condconv_surgery.recipe.study_record import StudyRecord
from condconv_surgery.reporting.render.study_table import render_study, study_markdown
from condconv_surgery.reporting.render.terminal import Printable
from condconv_surgery.reporting.study.study_results import StudyResults, results_of


@dataclass(frozen=True, repr=False)
class StudyReport(Printable):
    """A study: its ``record``, the ``results`` computed from it, and tables, a plot and a page.

        report = StudyReport.read("study")     # what compare or write wrote
        print(report.verdict)

    stopped_by: the number of the signal that ended the study early, 0 when all runs that were planned are done.
    """

    record: StudyRecord
    stopped_by: int = 0

    @property
    def complete(self) -> bool:
        return not self.stopped_by

    @cached_property
    def results(self) -> StudyResults:
        """Rows, verdict and notes, from the record alone."""
        return results_of(self.record)

    @property
    def verdict(self) -> str:
        """What to do, in one sentence; in two where several arms gain."""
        return self.results.verdict

    @classmethod
    def read(cls, path: str | Path) -> StudyReport:
        """The report in a study's folder, or in its ``study.json``. Raises ``InputError``, ``DamagedFileError``."""
        file = Path(path) / "study.json" if Path(path).is_dir() else Path(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{file} cannot be read: {error.strerror or error}.",
                "It is the folder of a study, or its study.json.",
                "STUDY",
            ) from error
        except ValueError as error:
            raise DamagedFileError(f"{file} is not JSON: {error}.", "compare writes it.") from error
        record = data.get("record", data) if isinstance(data, dict) else {}
        return cls(StudyRecord.from_dict(record))

    def to_dict(self) -> dict[str, Any]:
        """JSON values: ``verdict``, ``winner``, ``arms``, ``notes``, and the ``record``, which has every run."""
        return {**self.results.to_dict(), "complete": self.complete, "record": self.record.to_dict()}

    def to_markdown(self) -> str:
        return study_markdown(self.record, self.results)

    def to_html(self) -> str:
        """One self-contained page."""
        from condconv_surgery.reporting.render.study_page import study_page

        return study_page(self.record, self.results)

    def _tables(self, width: int) -> RenderableType:
        return render_study(self.record, self.results)

    def _answer(self) -> str:
        return self.verdict

    def write(self, folder: str | Path) -> None:
        """Write ``study.json``, ``study.md``, ``study.png`` and ``study.html`` into ``folder``, which is created."""
        from condconv_surgery.reporting.render.study_plot import study_figure

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"study.md": self.to_markdown(), "study.html": self.to_html()}
        texts["study.json"] = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        for name, text in texts.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        with replacing(folder / "study.png") as temporary:
            study_figure(self.record, self.results).savefig(temporary, format="png", dpi=160)
