"""Protects against silent changes: a resume says which settings have changed and what jumps, and every start is kept."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.folders import records, values
from support.workers import WorkerGroup

from lime_dist.checkpoint.changes import describe_changes
from lime_dist.checkpoint.store import Checkpoint
from lime_dist.config.load import load_config, make_config
from lime_dist.monitor import starts
from lime_dist.monitor.starts import describe_commit, describe_environment, record_start

Workers = Callable[[int], WorkerGroup]
RUN = ["train.steps=60", "optimizer.warmup_steps=5", "train.evaluation_samples=64"]


def changes(*overrides: str, before: tuple[str, ...] = (), updates: int = 60) -> list[str]:
    """What a run with these overrides says when it resumes a run of 60 steps."""
    saved = load_config(None, [*RUN, *before])
    manifest = {
        "config": saved.model_dump(mode="json"),
        "state": {"step": 60, "consumed_samples": 960},
        "optimizer_steps": updates,
    }
    config = load_config(None, [*RUN, *before, *overrides])
    return list(describe_changes(Checkpoint(Path("global_step60"), manifest), config))


def test_a_resume_without_a_change_says_nothing() -> None:
    assert changes() == []
    assert changes("train.evaluation_samples=64", before=("train.evaluation_samples=null",)) == []


def test_every_changed_key_is_a_line_with_both_values() -> None:
    told = changes(
        "optimizer.weight_decay=0.2", "optimizer.betas=[0.8,0.9]", "train.keep_every=7", "parallel.stage_layers=[16]",
        "run.directory=elsewhere", "precision=bf16", "model.lime.history={policy: chunked}",
    )  # fmt: skip
    assert told[0] == "settings changed since step 60:"
    assert set(told[1:]) >= {
        "  optimizer.weight_decay: 0.1 → 0.2",
        "  optimizer.betas: [0.9, 0.95] → [0.8, 0.9]",
        "  train.keep_every: null → 7",
        "  parallel.stage_layers: null → [16]",
        "  run.directory: runs/default → elsewhere",
        "  precision: fp32 → bf16",
        "  model.lime.history.policy: full → chunked",
        "  model.lime.history.chunk_size: null → 8",
    }
    assert all("{" not in line and "\n" not in line for line in told)


def test_the_datasets_of_a_blend_are_lines_too() -> None:
    told = changes(
        "data.blend=[{path: a, weight: 1}, {path: b, weight: 3}]",
        before=("data.blend=[{path: a, weight: 1}, {path: b, weight: 2}]",),
    )
    assert "  data.blend.1.weight: 2.0 → 3.0" in told


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        # The example of a finished run that goes on with more steps and a larger learning rate: cosine at (60 − 5) / (100 − 5).
        (("train.steps=100", "optimizer.lr=1e-2"), r"the learning rate of step 61 is 0.00377; with the earlier settings it was 1e-06"),
        (("train.steps=100",), r"the learning rate of step 61 is 0.000378; with the earlier settings it was 1e-06"),
        (("optimizer.min_lr=1e-5",), r"the learning rate of step 61 is 1e-05; with the earlier settings it was 1e-06"),
        (("optimizer.warmup_steps=600",), r"the learning rate of step 61 is 0.000102"),
        (("optimizer.router_lr=0.1",), r"the learning rate of the routers of step 61 is 0.0001; .* it was 1e-05"),
        (("train.global_batch_size=32",), r"the batch of step 61 has 32 samples; with the earlier settings it had 16"),
        (("train.batch_ramp={start: 4, increment: 4, samples: 1920}",), r"the batch of step 61 has 8 samples; .* it had 16"),
        (("train.seed=3",), r"train.seed changed from 0 to 3: the weights come from the checkpoint"),
        (("precision=bf16",), r"precision changed from fp32 to bf16: from now on weights and activations are of another type"),
        (("optimizer.weight_decay=0",), None),
        (("data.path=elsewhere",), None),
    ],
)  # fmt: skip
def test_what_jumps_is_a_warning_with_both_values(overrides: tuple[str, ...], warned: str | None) -> None:
    warnings = [line for line in changes(*overrides) if line.startswith("warning")]
    if warned is None:
        assert warnings == []
    else:
        assert any(re.fullmatch(f"warning: {warned}.*", line) for line in warnings), warnings


def test_a_change_in_the_middle_of_a_run_compares_that_step() -> None:
    """Skipped updates do not count: the schedule follows the updates."""
    told = changes("optimizer.lr=2e-3", updates=32)
    assert any(
        "the learning rate of step 61 is 0.00103; with the earlier settings it was 0.000515" in line for line in told
    ), told


def test_every_start_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, steps in enumerate((5, 7, 9), 1):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", "a b.yaml", f"train.steps={steps}"])
        config = load_config(None, [f"train.steps={steps}"])
        assert record_start(tmp_path, config, step=number) == tmp_path / f"starts/00{number}"
    kept = sorted((tmp_path / "starts").iterdir())
    assert [yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] for folder in kept] == [5, 7, 9]
    commands = [
        re.findall(r"^command: (.*)$", (folder / "environment.txt").read_text(), re.MULTILINE)[0] for folder in kept
    ]
    assert commands == [f"pretrain.py --config 'a b.yaml' train.steps={steps}" for steps in (5, 7, 9)]
    for name in ("config.yaml", "environment.txt"):
        assert (tmp_path / name).read_text() == (kept[-1] / name).read_text(), "the run folder itself has the newest"


def test_the_start_of_an_earlier_version_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 3}\n")
    record_start(tmp_path, load_config(None), step=3)
    assert (tmp_path / "starts/000/config.yaml").read_text() == "train: {steps: 3}\n"
    assert (tmp_path / "starts/001/config.yaml").exists()


def test_the_environment_of_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = dict(line.split(": ", 1) for line in describe_environment(60).splitlines())
    assert lines["start"].endswith("from step 60") and lines["GPUs"] and lines["torch"] and lines["python"]
    assert describe_commit(tmp_path) == "none (not a git repository)"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"]):
        subprocess.run([*git, *words], check=True)
    commit = describe_commit(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    assert describe_commit(tmp_path) == f"{commit} with uncommitted changes"
    (tmp_path / "inside").mkdir()
    assert describe_commit(tmp_path / "inside") == "none (not a git repository)", (
        "a repository around it is not the program's"
    )

    def no_git(*arguments: Any, **settings: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(starts.subprocess, "run", no_git)
    assert describe_commit(tmp_path) == "unknown (git does not answer)"


@pytest.fixture(scope="module")
def short_run(workers: Workers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps in one process."""
    directory = tmp_path_factory.mktemp("short")
    settings = values(dataset, directory, steps=6)
    assert workers(1).run("support.runs.run", values=settings) == [""]
    return directory


def test_a_resumed_run_prints_its_changes(workers: Workers, dataset: Path, short_run: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(short_run, directory)
    settings = values(dataset, directory, steps=8)
    settings["optimizer"]["lr"] = 1e-2
    ((problem, said),) = workers(1).run("support.runs.observe", values=settings)
    assert problem == ""
    assert "settings changed since step 6:\n" in said
    assert "\n  train.steps: 6 → 8\n" in said and "\n  optimizer.lr: 0.001 → 0.01\n" in said
    resumed = next(record["lr"] for record in records(directory) if record["step"] == 7)
    assert f"warning: the learning rate of step 7 is {resumed:.3g}; with the earlier settings it was 1e-06\n" in said
    assert [path.name for path in sorted((directory / "starts").iterdir())] == ["001", "002"]
    first = make_config(yaml.safe_load((directory / "starts/001/config.yaml").read_text()), "a test")
    assert first.train.steps == 6 and first.optimizer.lr == 1e-3


def test_another_history_policy_is_refused_by_its_key(workers: Workers, dataset: Path, short_run: Path) -> None:
    settings = values(dataset, short_run, steps=8)
    settings["model"]["lime"] = {"history": {"policy": "first_last"}}
    (problem,) = workers(1).run("support.runs.run", values=settings)
    assert "model.lime.history.policy: full there, first_last here" in problem and "{" not in problem
