"""Kill runs at random moments, start them again with the same command, and compare them with an undisturbed run.

    python benchmarks/chaos.py --data data/quickstart/shards --output runs/chaos --runs 40
    python benchmarks/chaos.py --data … --output … --runs 3 --steps 30 model.hidden_size=32

A run has two stages under `deepspeed` on this machine. `kill -9` hits a rank in half of the runs, and a launcher in the other half: alternately
the `deepspeed` that a user starts and its child, `deepspeed.launcher.launch`. Every third run is killed while it writes a checkpoint
(whose hidden folder exists), the others at a random moment of a random step. Half of them save in the background.

The same command starts again at once. A run passes if
- its losses, gradient norms and validation losses equal those of the undisturbed run bit for bit;
- it repeated no more steps than lie between two checkpoints, plus, in the background, those taken while one was written;
- all other processes of the killed job were gone within 30 s.

Resumable: a run that is in results.json of --output is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from results import read_results, write, write_results

from lime_dist import load_config
from lime_dist.errors import LimeError, run_command
from lime_dist.monitor.metrics import without_clock
from lime_dist.paths import user_path

ROOT = Path(__file__).resolve().parents[1]
SIZE = [
    "model.vocab_size=4096", "model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=6",
    "model.num_attention_heads=4", "data.sequence_length=32", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.evaluation_samples=16", "train.log_interval=1000", "parallel.pipeline_stages=2", "pipeline.timeout=60",
]  # fmt: skip
"""Overrides of configs/quickstart.yaml for all runs; those of the command line follow."""

PATIENCE = 300.0
"""Seconds after which the benchmark gives up waiting."""
GONE_WITHIN = 30.0
"""Seconds within which the other processes must end: as long as the launcher waits before it kills them."""


@dataclass(frozen=True)
class Plan:
    """When and where a run is killed.

    Attributes:
        victim: ``rank``, ``deepspeed`` (the process that a user starts) or ``launch`` (its child and the parent of the ranks).
        step: the step in which it is killed.
        inside: whether it is killed while it writes the checkpoint of that step.
        delay: seconds from that moment to the kill.
    """

    victim: str
    step: int
    inside: bool
    delay: float
    rank: int
    asynchronous: bool


@dataclass(frozen=True)
class Result:
    """The outcome of a run. ``seconds_until_gone`` is the time from the kill to the end of the last process of the job."""

    victim: str
    inside: bool
    asynchronous: bool
    killed_at: int
    resumed_from: int
    equal: bool
    repeated: int
    seconds_until_gone: float
    seconds: float


def make_plan(seed: int, index: int, steps: int, interval: int) -> Plan:
    generator = random.Random(f"{seed} {index}")
    inside = index % 3 == 0
    latest = max(2, steps - interval)  # so that the run does not end before its kill
    checkpoints = range(interval, max(interval + 1, latest), interval)
    return Plan(
        victim="rank" if index % 2 == 0 else ("deepspeed", "launch")[index // 2 % 2],
        step=generator.choice(checkpoints) if inside else generator.randrange(1, latest),
        inside=inside,
        delay=generator.uniform(0, 0.01 if inside else 0.1),
        rank=generator.randrange(2),
        asynchronous=index % 4 >= 2,
    )


class Job:
    """One call of the command, with its output in ``log``."""

    def __init__(self, command: list[str], log: Path) -> None:
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self._log = log
        with log.open("a") as file:
            self._begin = file.tell()
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def said(self) -> str:
        return self._log.read_bytes()[self._begin :].decode(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Return the process and its descendants."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def finish(self) -> None:
        """Wait for the end; raise LimeError if the command fails."""
        status = self.process.wait(PATIENCE)
        if status:
            raise LimeError(f"{self._log}: the command ended with status {status}: {self.said().strip()[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=user_path, help="folder with dataset.json")
    parser.add_argument(
        "--output", required=True, type=user_path, help="folder for the runs, table.md and results.json"
    )
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--interval", type=int, default=6, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of moments and victims")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    if arguments.runs < 1 or not 1 <= arguments.interval < arguments.steps:
        raise LimeError(
            f"--runs {arguments.runs}, --interval {arguments.interval}, --steps {arguments.steps}: give at least one run "
            "and one checkpoint before the last step"
        )
    overrides = [
        *SIZE, *arguments.overrides, f"data.path={arguments.data.resolve()}", f"train.steps={arguments.steps}",
        f"train.checkpoint_interval={arguments.interval}", f"train.evaluation_interval={2 * arguments.interval}",
    ]  # fmt: skip
    load_config(ROOT / "configs/quickstart.yaml", overrides)  # report mistakes before anything runs
    settings = {
        "overrides": overrides,
        "steps": arguments.steps,
        "interval": arguments.interval,
        "seed": arguments.seed,
    }
    output = arguments.output.resolve()
    finished = read_results(output, settings)
    wanted = undisturbed(output, overrides)
    for index in range(arguments.runs):
        if str(index) not in finished:
            plan = make_plan(arguments.seed, index, arguments.steps, arguments.interval)
            result = disturb(output / f"run{index:03d}", overrides, plan, wanted)
            finished[str(index)] = asdict(result)
            write_results(output, settings, finished)
            print(f"run {index}: {result}", flush=True)
    results = [Result(**finished[str(index)]) for index in range(arguments.runs)]
    table = make_table(results, arguments.interval)
    write(output / "table.md", table)
    print(table)
    for index, result in enumerate(results):
        if not passes(result, arguments.interval):
            raise LimeError(f"run {index} of {output} does not equal the undisturbed run: {result}")


def undisturbed(output: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Train without a kill, unless this was done before; return the records."""
    directory = output / "undisturbed"
    Job(make_command(directory, overrides), output / "undisturbed.log").finish()  # a finished run ends at once
    return numbers(directory)


def disturb(directory: Path, overrides: list[str], plan: Plan, wanted: list[dict[str, Any]]) -> Result:
    """Run, kill, run again with the same command, and compare."""
    begin = time.monotonic()
    overrides = [*overrides, f"checkpoint.asynchronous={str(plan.asynchronous).lower()}"]
    log = directory.with_suffix(".log")
    command = make_command(directory, overrides)
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    job = Job(command, log)
    try:
        wait_for_moment(job, directory, plan)
        family = job.family()
        victim = choose_victim(family, plan)
        inside = bool(partial_folders(directory))
        victim.kill()
        killed = time.monotonic()
    except psutil.NoSuchProcess:
        raise LimeError(f"{directory.name} ended before its kill; give more --steps") from None
    killed_at = last_step(directory)
    if plan.victim == "rank":  # a launcher ends with its rank; nothing waits for the death of a launcher
        job.process.wait(PATIENCE)
    again = Job(command, log)
    gone, alive = psutil.wait_procs(family, timeout=PATIENCE)
    seconds_until_gone = time.monotonic() - killed
    if alive:
        raise LimeError(f"{directory.name}: still alive {PATIENCE:.0f} s after the kill: {alive}")
    # The new processes take seconds to start; after that they cut off the records of the steps that they repeat.
    reached = last_step(directory)
    again.finish()
    resumed = re.search(r"^resumed from step (\d+) ", again.said(), re.MULTILINE)
    resumed_from = int(resumed[1]) if resumed else 0
    return Result(
        victim=plan.victim,
        inside=inside,
        asynchronous=plan.asynchronous,
        killed_at=killed_at,
        resumed_from=resumed_from,
        equal=numbers(directory) == wanted,
        repeated=max(0, reached - resumed_from),
        seconds_until_gone=seconds_until_gone,
        seconds=time.monotonic() - begin,
    )


def make_command(directory: Path, overrides: list[str]) -> list[str]:
    """Return the command of a run. It is the same at every call, including the port, which is derived from the name of the run."""
    port = 20000 + zlib.crc32(str(directory).encode()) % 10000
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--hostfile", os.devnull]
    entry = [str(ROOT / "pretrain.py"), "--config", str(ROOT / "configs/quickstart.yaml")]
    return [*launcher, "--num_gpus", "2", "--master_port", str(port), *entry, *overrides, f"run.directory={directory}"]


def wait_for_moment(job: Job, directory: Path, plan: Plan) -> None:
    """Wait for the moment of the kill.

    Raises:
        psutil.NoSuchProcess: the run ended before.
    """

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if job.process.poll() is not None:
                raise psutil.NoSuchProcess(job.process.pid)
            if time.monotonic() > deadline:
                raise LimeError(f"{directory.name}: nothing happened for {PATIENCE:.0f} s")
            time.sleep(0.0005)

    metrics = directory / "metrics.jsonl"
    until(metrics.exists)
    if not plan.inside:
        until(lambda: last_step(directory) >= plan.step)
        time.sleep(plan.delay)
        return
    until(lambda: last_step(directory) >= plan.step - 1)
    while True:  # if the save ends before the delay, take the next save
        until(lambda: bool(partial_folders(directory)))
        time.sleep(plan.delay)
        if partial_folders(directory):
            return


def partial_folders(directory: Path) -> list[str]:
    """Return the names of checkpoints that are being written."""
    try:
        return [name for name in os.listdir(directory / "checkpoints") if name.endswith(".partial")]
    except FileNotFoundError:
        return []


def choose_victim(family: list[psutil.Process], plan: Plan) -> psutil.Process:
    if plan.victim == "deepspeed":
        return family[0]
    for process in family:
        words = process.cmdline()
        if plan.victim == "launch" and "deepspeed.launcher.launch" in words:
            return process
        if plan.victim == "rank" and f"--local_rank={plan.rank}" in words:
            return process
    raise psutil.NoSuchProcess(family[0].pid)


def last_step(directory: Path) -> int:
    """Return the last step with a complete line in metrics.jsonl."""
    try:
        text = (directory / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    lines = text[: text.rfind("\n") + 1].splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0


def numbers(directory: Path) -> list[dict[str, Any]]:
    """Return the records of a run without times. Floats keep all their digits in JSON, so equal records are equal bit for bit."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


def passes(result: Result, interval: int) -> bool:
    most = interval if not result.asynchronous else 2 * interval
    return result.equal and result.repeated <= most and result.seconds_until_gone <= GONE_WITHIN


def make_table(results: list[Result], interval: int) -> str:
    lines = [
        f"Checkpoints every {interval} steps.\n",
        "| killed | when | saving | runs | same to the last bit | most steps repeated | all gone after, at most |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = sorted({(r.victim, r.inside, r.asynchronous) for r in results}, key=lambda kind: (kind[0] != "rank", *kind))
    for victim, inside, asynchronous in kinds:
        group = [r for r in results if (r.victim, r.inside, r.asynchronous) == (victim, inside, asynchronous)]
        lines.append(
            f"| {'a rank' if victim == 'rank' else f'`{victim}`'} | {'in a save' if inside else 'at any moment'} | "
            f"{'in the background' if asynchronous else 'at once'} | {len(group)} | {sum(r.equal for r in group)} | "
            f"{max(r.repeated for r in group)} | {max(r.seconds_until_gone for r in group):.1f} s |"
        )
    passed = sum(passes(result, interval) for result in results)
    lines.append(
        f"\n{passed} of {len(results)} runs passed; they took {sum(r.seconds for r in results) / 60:.0f} minutes."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
