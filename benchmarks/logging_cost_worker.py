"""One process of `logging_cost.py`: train as pretrain.py does, and sum up the time of monitoring by kind of work.

If one timed function calls another, only the outer one is counted. Gathering includes the wait for the slower rank, which would
otherwise occur a little later.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pretrain
from lime_dist.config.load import make_config
from lime_dist.distributed import start_processes

MONITORING = {
    "reading the clock": [("lime_dist.pipeline.clock", "Clock._mark"), ("lime_dist.pipeline.clock", "Clock.totals")],
    "gathering numbers": [("lime_dist.train.measurements", "Measurements.gather")],
    "working them out": [("lime_dist.train.loop", "interval_record"), ("lime_dist.train.loop", "stage_scalars")],
    "routers": [("lime_dist.train.loop", "_draw_routers")],
    "writing": [("lime_dist.monitor.records", f"Records.{name}") for name in ("write", "draw", "flush")],
}
"""Functions that only serve monitoring, by kind of work: their modules and their names there."""


class Stopwatch:
    """Seconds and calls of functions by label, including what they call."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inside = False

    def attach(self, module: str, name: str, label: str) -> None:
        *path, last = name.split(".")
        owner: Any = importlib.import_module(module)
        for part in path:
            owner = getattr(owner, part)
        function = getattr(owner, last)

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            if self._inside:
                return function(*arguments, **keywords)
            self._inside, begin = True, time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[label] += time.perf_counter() - begin
                self.calls[label] += 1
                self._inside = False

        setattr(owner, last, timed)


def main() -> None:
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    config = make_config(yaml.safe_load(settings["config"]), "the benchmark")
    start_processes()
    stopwatch = Stopwatch()
    for label, functions in MONITORING.items():
        for module, name in functions:
            stopwatch.attach(module, name, label)
    pretrain.train(config, verbose=False)
    lines = (Path(config.run.directory) / "metrics.jsonl").read_text().splitlines()
    measurements = {
        "seconds": {label: stopwatch.seconds[label] for label in MONITORING},
        "calls": {label: stopwatch.calls[label] for label in MONITORING},
        "step_seconds": sum(json.loads(line).get("step_seconds", 0.0) for line in lines),
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(measurements))
    pretrain.leave(0)


if __name__ == "__main__":
    main()
