"""Run one section of `gpu_check.py`: NAME, the output folder, and the machine's facts as JSON."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from gpu_check_machine import FULL, SMALL
from gpu_check_report import Report

ON_GLOO = ("equality", "memory", "compiled")
"""Sections of one process that make many engines: each takes seconds to join NCCL."""


def main() -> None:
    name, output, facts = sys.argv[1:]
    machine: dict[str, str] = json.loads(facts)
    report = Report(Path(output) / f"{name}.json", machine)
    if name in ON_GLOO:
        os.environ["LIME_BACKEND"] = "gloo"
    module = import_module(f"gpu_check_{'pipeline' if name in ('shared', 'nccl') else name}")
    module.measure(report, FULL if machine["sizes"] == "full" else SMALL)


if __name__ == "__main__":
    main()
