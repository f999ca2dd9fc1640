"""A pipeline of processes of its own, one of which ends or stops in the middle of a step."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import prepare, start


@dataclass(frozen=True)
class Survivor:
    """How a process that nobody harmed ended: its exit status, when (seconds after the harm), and what it said."""

    status: int | None
    seconds: float
    said: str


def run(values: dict[str, Any], victim: int, instruction: str, harm: int, folder: Path) -> list[Survivor]:
    """Train until stage ``victim`` sends itself the signal ``harm`` at the second ``instruction`` of the second step; wait for
    the others, then end what is left."""
    stages = values["parallel"]["pipeline_stages"]
    arguments = (values, victim, instruction, harm, str(folder))
    processes = start(stages, _work, lambda rank: arguments)
    try:
        mark = folder / "harm"
        begin = time.monotonic()
        while not mark.exists() and time.monotonic() - begin < 120 and all(p.is_alive() for p in processes):
            time.sleep(0.02)
        assert mark.exists(), "\n".join((folder / f"{rank}.err").read_text() for rank in range(stages))
        harmed = time.monotonic()
        found = []
        for rank, process in enumerate(processes):
            if rank != victim:
                process.join(60)
                said = (folder / f"{rank}.err").read_text()
                found.append(Survivor(process.exitcode, time.monotonic() - harmed, said))
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()


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
    """Make the engine harm its process at the second instruction of that kind of the second step, or at the only one."""
    describe = engine._describe

    def armed(command: Any, count: int) -> str:
        once = instruction in ("ReduceGrads", "OptimizerStep")
        if type(command).__name__ == instruction and engine.global_steps == 1 and count == (0 if once else 1):
            mark.touch()
            os.kill(os.getpid(), harm)
        return str(describe(command, count))

    engine._describe = armed


HARMS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
