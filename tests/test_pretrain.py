"""Tests of pretrain.py as users run it, with a real launcher and real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

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
def test_output_of_a_run(dataset: Path, tmp_path: Path) -> None:
    """Only one of the two ranks prints. (Kills are tested in checkpoint/test_chaos.py.)"""
    chooses = "parallel.activation_checkpointing=auto"
    finished = run(*small_run(dataset, tmp_path / "run"), "train.steps=40", chooses)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(f"{chooses}: false on stages 0 to 1, for 85% of ") == 1
    for line in ("validation loss: ", "tokens seen: 2,560", f"run folder: {tmp_path / 'run'}", "tensorboard --logdir "):
        assert finished.stdout.count(line) == 1, f"{line!r} is printed once"
    lines = re.findall(r"^step (\d+)/40 \| loss ([\d.]+) .* \| \d\d:\d\d:\d\d$", finished.stdout, re.MULTILINE)
    assert [int(step) for step, _ in lines] == [10, 20, 30, 40], "one line per interval, with the time of day"
    single = [loss for _, loss, _ in losses(tmp_path / "run")]
    for index, (_, shown) in enumerate(lines):
        assert float(shown) == pytest.approx(fmean(single[10 * index : 10 * index + 10]), abs=1e-4), (
            "the mean of the interval"
        )
    assert re.search(r"^14,112 parameters; [\d.]+ epochs of training samples$", finished.stdout, re.MULTILINE)
    logged = (tmp_path / "run/console.log").read_text().splitlines()
    assert [line[20:] for line in logged] == [
        line for line in finished.stdout.splitlines() if line.strip() and line in {each[20:] for each in logged}
    ]
    steps = {line for line in finished.stdout.splitlines() if line.startswith("step ")}
    assert steps <= {line[20:] for line in logged}
    assert {line[20:30] for line in logged} >= {"lime: 4 la", "step 40/40"}
    times = [json.loads(line)["time"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times) and times[0] > 1.6e9


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["none", "deepspeed"])
def test_ctrl_c_saves_and_ends_without_a_traceback(dataset: Path, tmp_path: Path, launcher: str) -> None:
    """As a terminal sends it, to all processes. (`deepspeed` itself ends with a traceback of its own.)"""
    alone = launcher == "none"
    words = command(
        *small_run(dataset, tmp_path / "run", 1 if alone else 2), "train.steps=100000", "train.checkpoint_interval=0",
        launcher=[sys.executable] if alone else None,
    )  # fmt: skip
    metrics, output = tmp_path / "run/metrics.jsonl", tmp_path / "output"
    with output.open("w") as file, subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
    ) as process:  # fmt: skip
        until = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < until, output.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(60)
        while "the same command resumes" not in output.read_text() and time.monotonic() < until:
            time.sleep(0.05)
    said = output.read_text()
    stopped = re.search(r"stopped by SIGINT at step (\d+): saved (\S+);", said)
    assert stopped and (Path(stopped[2]) / "manifest.json").is_file(), said
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == int(stopped[1])
    assert 'pretrain.py",' not in said and said.count("Traceback") <= (0 if alone else 1), said
    assert status == 130 or not alone


def test_a_peer_that_is_gone_before_training_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import pretrain
    from lime_dist.errors import PeerLost

    def broken(*_: object) -> None:
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:1: reset. GLHF")

    monkeypatch.setattr(
        "sys.argv", ["pretrain.py", "--config", str(ROOT / "configs/quickstart.yaml"), "parallel.pipeline_stages=1"]
    )
    monkeypatch.setattr("lime_dist.distributed.start_processes", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(pretrain, "train", broken)
    with pytest.raises(PeerLost, match="^rank 3, before training: another process of the job is gone"):
        pretrain.main()


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_status_2_under_the_launcher(tmp_path: Path) -> None:
    finished = run("--config", "configs/quickstart.yaml", "train.stpes=3", f"run.directory={tmp_path / 'run'}")
    assert finished.returncode == 2
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if "error:" in line]
    assert lines == ["error: unknown key train.stpes=3 in the command line; the nearest valid key is train.steps"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_alone_and_under_torchrun(dataset: Path, tmp_path: Path) -> None:
    """Two processes under torchrun resume the run of one process without a launcher. Nothing is compiled."""
    extensions = tmp_path / "extensions"
    arguments = [*small_run(dataset, tmp_path / "run", 1), "train.steps=20"]
    alone = run(*arguments, launcher=[sys.executable], TORCH_EXTENSIONS_DIR=str(extensions))
    assert alone.returncode == 0, alone.stderr
    assert not extensions.exists(), "DeepSpeed compiles nothing into this folder"
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
