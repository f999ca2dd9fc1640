"""Protects the Slurm script under a real Slurm: ranks on two nodes, the time limit, requeueing, and resuming."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from cluster.bed import ROOT
from cluster.slurm import Slurm
from cluster.test_cluster import numbers, values, write


@pytest.mark.slow
def test_a_run_at_its_time_limit_is_requeued_and_resumes(
    queue: Slurm, virtual_environment: Path, dataset: Path, tmp_path: Path
) -> None:
    """Two nodes with a stage each. The time limit is one minute; Slurm signals the script when fifty seconds are left."""
    settings = values(dataset, tmp_path / "run", 100_000, checkpoint_interval=0, evaluation_samples=0)
    config, log = write(settings, tmp_path / "run.yaml"), tmp_path / "log"
    # Nodes without GPUs, one process each; everything else as in the script.
    options = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=1", "--signal=B:USR1@50"]
    command = [
        "sbatch",
        "--parsable",
        *options,
        f"--chdir={ROOT}",
        f"--output={log}",
        str(ROOT / "launch/slurm.sbatch"),
    ]
    environment = {"LIME_ROOT": str(ROOT), "LIME_VENV": str(virtual_environment), "DS_ACCELERATOR": "cpu"}
    number = queue.run(*command, str(config), **environment).strip()

    def await_state(states: tuple[str, ...], restarts: str) -> None:
        begin = time.monotonic()
        while (job := queue.job(number))["JobState"] not in states or job["Restarts"] != restarts:
            ended = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
            assert job["JobState"] not in ended, (job["JobState"], log.read_text())
            assert time.monotonic() - begin < 100, log.read_text()
            time.sleep(0.2)

    await_state(("PENDING", "REQUEUED", "COMPLETING"), "1")
    (saved,) = (
        int(path.name.removeprefix("global_step")) for path in (tmp_path / "run/checkpoints").glob("global_step*")
    )
    write({**settings, "train": {**settings["train"], "steps": saved + 3}}, config)
    await_state(("COMPLETED",), "1")
    said = log.read_text()
    assert re.search(rf"^job {number}, start 1: 2 processes, master host-a:\d+$", said, re.MULTILINE), said
    for line in (
        "stages 0 on host-a, 1 on host-b; 1 of 1 boundaries between hosts",
        "the time limit is near: stopping after this step",
        f"saved; job {number} is requeued",
        f"job {number}, start 2: 2 processes, master host-a:",
        f"resumed from step {saved} ",
    ):
        assert line in said, said
    assert said.count("is requeued") == 1
    assert [record["step"] for record in numbers(tmp_path / "run")] == list(range(1, saved + 4))
