"""Protects the main command as users run it: real launcher, real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29611"]


def command(*arguments: str, launcher: list[str] | None = None) -> list[str]:
    return [*(launcher if launcher is not None else LAUNCHER), "pretrain.py", *arguments]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def small_run(dataset: Path, directory: Path, stages: int = 2) -> list[str]:
    return [
        "--config", "configs/quickstart.yaml", f"data.path={dataset}", f"run.directory={directory}", "data.sequence_length=16",
        "model.vocab_size=320", "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=4",
        "train.steps=300", "train.global_batch_size=4", "train.micro_batch_size=1", "train.evaluation_interval=50",
        "train.evaluation_samples=4", "train.checkpoint_interval=20", f"parallel.pipeline_stages={stages}",
    ]  # fmt: skip


def run(*arguments: str, launcher: list[str] | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, launcher=launcher),
        cwd=ROOT,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(directory: Path) -> list[tuple[float, float, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_killed_and_started_again_equals_undisturbed(dataset: Path, tmp_path: Path) -> None:
    """``kill -9`` of one rank somewhere after step 30; the same command goes on and ends with the same numbers."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished = run(*small_run(dataset, straight))
    assert finished.returncode == 0, finished.stderr
    for line in ("validation loss: ", "tokens seen: 19,200", f"run folder: {straight}", "tensorboard --logdir "):
        assert finished.stdout.count(line) == 1, f"one rank says {line!r} once"
    assert len(re.findall(r"^step \d+/300 \| loss", finished.stdout, re.MULTILINE)) == 30, "one line an interval"

    with subprocess.Popen(
        command(*small_run(dataset, killed)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 200
        metrics = killed / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 30:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        ranks = subprocess.run(
            ["pgrep", "-f", f"pretrain.py --local_rank=1 .*{killed}"], capture_output=True, text=True, check=True
        )
        workers = [
            int(pid) for pid in ranks.stdout.split() if int(pid) != process.pid and _parent_of(int(pid)) != process.pid
        ]
        assert len(workers) == 1, ranks.stdout
        os.kill(workers[0], signal.SIGKILL)
        assert process.wait(120) != 0

    before = losses(killed)
    assert before[-1][0] < 300
    again = run(*small_run(dataset, killed))
    assert again.returncode == 0, again.stderr
    assert re.search(r"^resumed from step (20|40|60|80|\d+0) ", again.stdout, re.MULTILINE)
    assert losses(killed) == losses(straight)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_status_2_under_the_launcher(tmp_path: Path) -> None:
    finished = run("--config", "configs/quickstart.yaml", "train.stpes=3", f"run.directory={tmp_path / 'run'}")
    assert finished.returncode == 2
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if "error:" in line]
    assert lines == ["error: unknown key train.stpes=3 in the command line; the nearest valid key is train.steps"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_alone_and_under_torchrun(dataset: Path, tmp_path: Path) -> None:
    """One process without a launcher, continued by two under torchrun. Nothing is compiled for it."""
    extensions = tmp_path / "extensions"
    arguments = [*small_run(dataset, tmp_path / "run", 1), "train.steps=20"]
    alone = run(*arguments, launcher=[sys.executable], TORCH_EXTENSIONS_DIR=str(extensions))
    assert alone.returncode == 0, alone.stderr
    assert not extensions.exists(), "DeepSpeed keeps what it compiles there"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29612"]
    both = run(*small_run(dataset, tmp_path / "run", 2), "train.steps=40", launcher=torchrun)
    assert both.returncode == 0, both.stderr
    assert "resumed from step 20" in both.stdout
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(1, 41))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config", "none.yaml"], "error: cannot read the configuration none.yaml: No such file or directory"),
        (["--config", "configs/quickstart.yaml"], "error: parallel.pipeline_stages=2 does not divide the 1 processes"),
        (
            ["--config", "configs/quickstart.yaml", "data.seed=1", "--verbose", "train.stpes=3"],
            "error: unknown key train.stpes=3 in the command line; the nearest valid key is train.steps",
        ),
        ([], "the following arguments are required: --config"),
    ],
)
def test_mistakes_without_a_launcher(arguments: list[str], line: str) -> None:
    finished = run(*arguments, launcher=[sys.executable])
    assert finished.returncode == 2 and line in finished.stderr and "Traceback" not in finished.stderr


def test_help_has_examples() -> None:
    finished = run("--help", launcher=[sys.executable])
    assert finished.returncode == 0 and "deepspeed --num_gpus 2 pretrain.py --config" in finished.stdout
