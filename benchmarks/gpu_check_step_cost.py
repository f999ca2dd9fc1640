"""Section of `gpu_check.py`: the table of `step_cost.py` on the device."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_check_machine import Sizes, memory_at_hand, on_gpu
from gpu_check_report import Report

BATCHES = ((60e9, 4), (30e9, 2), (0.0, 1))
"""Sequences of a batch by the memory that they need."""


def measure(report: Report, sizes: Sizes) -> None:
    options = list(sizes.step_cost)
    if "--batch" not in options:
        free = memory_at_hand()
        options += ["--batch", str(next(batch for needed, batch in BATCHES if free >= needed))]
    if on_gpu():
        options += ["--device", "cuda"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("step_cost.py")), "--output", folder, *options]
        subprocess.run(command, check=True)
        lines = (Path(folder) / "table.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    report.header = cells(table[0])
    for line in table[2:]:
        report.add(*cells(line))
    report.notes = [
        " ".join(line for line in lines if line and not line.startswith("|")),
        f"Options: `{' '.join(options)}`.",
    ]
    report.finish("; ".join(f"{row[0]} {row[1]}" for row in report.rows[:3]))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
