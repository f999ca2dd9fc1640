"""What a section of `gpu_check.py` reports, kept in one file per section, and the table of all sections."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from results import write

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"


@dataclass
class Report:
    """The results of a section. `save` writes what there is, so that a section that is stopped leaves its rows behind.

    Attributes:
        path: the section's file.
        machine: of `machine_facts`. Results of another machine or version are measured again.
        status: PASSED, FAILED or LEFT_OUT.
        summary: the result in one line; why it failed or was left out.
        header: of the section's own table.
        notes: lines below that table.
        problems: one line for each case that failed; the section goes on.
    """

    path: Path
    machine: dict[str, str]
    status: str = FAILED
    summary: str = "ended before its first result"
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._begin = time.perf_counter() - self.seconds

    def add(self, *row: str) -> None:
        """Add a row to the table."""
        self.rows.append(list(row))
        self.summary = f"stopped after {len(self.rows)} rows"
        self.save()

    def finish(self, summary: str) -> None:
        """End the section: it has passed if there are no problems."""
        self.status = FAILED if self.problems else PASSED
        self.summary = "; ".join([*self.problems[:2], *(["…"] if len(self.problems) > 2 else [])]) or summary
        self.save()

    def leave_out(self, reason: str) -> None:
        """End the section without results."""
        self.status, self.summary = LEFT_OUT, reason
        self.save()

    def save(self) -> None:
        self.seconds = time.perf_counter() - self._begin
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        write(self.path, json.dumps(content, indent=1) + "\n")


def read_report(path: Path) -> Report | None:
    """The report in a section's file; None if there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Report(path=path, **content)
    except (OSError, ValueError, TypeError):
        return None


def make_table(machine: Mapping[str, str], titles: Mapping[str, str], reports: Mapping[str, Report]) -> str:
    """The results as a section of Markdown: a table with a line for each section, then the sections' own tables.

    Args:
        titles: by section.
        reports: by section; those that are missing have not run.
    """
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device")
    lines = [
        f"## On {machine['device']} (`gpu_check.sh`)", "", "```bash", "bash launch/gpu_check.sh", "```", "",
        f"{versions}.", "", f"| {machine['device']} | | result | s |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, title in titles.items():
        report = reports.get(name)
        cells = [title, *(("not run", "", "") if report is None else _cells(report))]
        lines.append(f"| {' | '.join(cells)} |")
    for name, title in titles.items():
        report = reports.get(name)
        if report is None or not (report.rows or report.notes):
            continue
        lines += ["", title]
        if report.rows:
            lines += ["", _line(report.header), "|---" * len(report.header) + "|", *map(_line, report.rows)]
        for note in report.notes:
            lines += ["", note]
    return "\n".join(lines) + "\n"


def _cells(report: Report) -> tuple[str, str, str]:
    return report.status, report.summary.replace("|", "/"), f"{report.seconds:.0f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
