"""Tests of runs that are killed or signalled under the real launcher; `benchmarks/chaos.py` is the long form."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/chaos.py"


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_three_kills_cost_nothing_but_time(dataset: Path, tmp_path: Path) -> None:
    """Kills of a rank while it saves, of a launcher, and of a rank while a thread saves. The same command, run again, ends with
    the same losses, bit for bit."""
    finished = chaos("--data", str(dataset), "--output", str(tmp_path), "--runs", "3", "--steps", "18")
    assert finished.returncode == 0, finished.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in finished.stdout and "3 of 3 runs passed" in table
    results = json.loads((tmp_path / "results.json").read_text())["results"].values()
    assert [result["victim"] for result in results] == ["rank", "deepspeed", "rank"]
    assert [result["inside"] for result in results][0] and all(result["equal"] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [("launch", signal.SIGTERM), ("rank", signal.SIGUSR1)])
def test_a_signal_under_the_launcher_ends_in_a_checkpoint(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, number: int
) -> None:
    """It ends well within the launcher's 30 s. Exit status is 0, except for a launcher that got the signal itself."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from chaos import SIZE, Job, Plan, choose_victim, last_step, make_command, wait_for_moment

    directory = tmp_path / "run"
    overrides = [*SIZE, f"data.path={dataset}", "train.steps=10000"]
    job = Job(make_command(directory, overrides), tmp_path / "log")
    plan = Plan(victim, 3, False, 0.0, 1, False)
    wait_for_moment(job, directory, plan)
    family = job.family()
    os.kill(choose_victim(family, plan).pid, number)
    begin = time.monotonic()
    status = job.process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive and time.monotonic() - begin < 15
    step = last_step(directory)
    assert job.said().splitlines()[-1] == (
        f"stopped by {signal.Signals(number).name} at step {step}: saved {directory}/checkpoints/global_step{step}; "
        "the same command resumes from there"
    )
    assert status == (1 if victim == "launch" else 0) and (directory / f"checkpoints/global_step{step}").is_dir()


def test_a_mistake_in_the_call_is_one_line(tmp_path: Path) -> None:
    finished = chaos("--data", str(tmp_path), "--output", str(tmp_path / "out"), "--interval", "60")
    assert finished.returncode == 2 and finished.stderr.startswith(
        "error: --runs 40, --interval 60, --steps 60: give at"
    )
    assert not (tmp_path / "out").exists()


def test_a_second_start_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits for a limited time, and not at all if nobody holds the folder."""
    from lime_dist.data.files import lock_folder
    from lime_dist.errors import LimeError
    from lime_dist.monitor import run_lock

    monkeypatch.setattr(run_lock, "TIMEOUT", 0.3)
    run_lock.wait_for_predecessor(tmp_path)
    with lock_folder(tmp_path), pytest.raises(LimeError, match="another run is writing here"):
        run_lock.wait_for_predecessor(tmp_path)
    assert capsys.readouterr().out == f"another run is still writing into {tmp_path}; waiting for it to end\n"
    run_lock.wait_for_predecessor(tmp_path)
    assert capsys.readouterr().out == ""
