"""Pipelines in separate processes, one of which is killed or stopped in the middle of a step."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.processes import prepare, start


@dataclass(frozen=True)
class Survivor:
    """How another process than the victim ended: its exit status, the seconds since the harm, and what it printed."""

    status: int | None
    seconds: float
    said: str


class Case:
    """Train until stage ``victim`` sends itself the signal ``harm`` at the second ``instruction`` of the second step; then wait
    for the others, and end those that are left.

    Attributes:
        survivors: by rank, the processes that have ended or that are waited for no longer.
    """

    def __init__(self, values: dict[str, Any], victim: int, instruction: str, harm: int, folder: Path) -> None:
        self.victim, self.folder = victim, folder
        self.survivors: dict[int, Survivor] = {}
        self._values = values
        self._arguments = (values, victim, instruction, harm, str(folder))
        self._processes: list[BaseProcess] = []
        self._begin, self._harmed = 0.0, 0.0

    def start(self) -> None:
        self._processes = start(self._values["parallel"]["pipeline_stages"], _work, lambda rank: self._arguments)
        self._begin = time.monotonic()

    def goes_on(self) -> bool:
        """Update the survivors; return whether any are missing. To be called every few hundredths of a second."""
        now = time.monotonic()
        if not self._harmed:
            if not (self.folder / "harm").exists():
                return now - self._begin < 120 and all(process.is_alive() for process in self._processes)
            self._harmed = now
        for rank, process in enumerate(self._processes):
            if rank not in self.survivors and rank != self.victim and (process.exitcode is not None or self._late(now)):
                self.survivors[rank] = Survivor(process.exitcode, now - self._harmed, self._said(rank))
        return len(self.survivors) < len(self._processes) - 1

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def check_harmed(self) -> None:
        """Fail, with what the processes printed, if the victim never reached its instruction."""
        assert self._harmed, "\n".join(self._said(rank) for rank in range(len(self._processes)))

    def _late(self, now: float) -> bool:
        return now - self._harmed > 60

    def _said(self, rank: int) -> str:
        file = self.folder / f"{rank}.err"
        return file.read_text() if file.exists() else ""


def run(cases: list[Case], at_a_time: int = 3) -> None:
    """Run the cases, several at a time, since a case spends most of its time waiting for a time-out."""
    waiting, running = list(cases), list[Case]()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(waiting.pop(0))
                running[-1].start()
            for case in list(running):
                if not case.goes_on():
                    running.remove(case)
                    case.end()
            time.sleep(0.02)
    finally:
        for case in running:
            case.end()


def _work(
    rank: int, size: int, port: int, values: dict[str, Any], victim: int, instruction: str, harm: int, folder: str
) -> None:
    file = os.open(Path(folder) / f"{rank}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 2)
    prepare(rank, size, port)
    from support.transfers import build, losses_of

    from lime_dist.distributed import start_processes
    from lime_dist.errors import run_command

    def train() -> None:
        start_processes()
        config, engine, _ = build(values)
        if rank == victim:
            _arm(engine, instruction, harm, Path(folder) / "harm")
        losses_of(config, engine, range(3))

    try:
        run_command(train)
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    os._exit(0)


def _arm(engine: Any, instruction: str, harm: int, mark: Path) -> None:
    """Make the engine signal its own process at the second instruction of that kind in the second step, or at the only one."""
    describe = engine._describe

    def armed(command: Any, count: int) -> str:
        once = instruction in ("ReduceGrads", "OptimizerStep")
        if type(command).__name__ == instruction and engine.global_steps == 1 and count == (0 if once else 1):
            mark.touch()
            os.kill(os.getpid(), harm)
        return str(describe(command, count))

    engine._describe = armed


HARMS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
