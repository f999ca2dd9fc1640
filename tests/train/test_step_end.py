"""Tests of the end of a step: whatever happens to one rank, all ranks react in the same way, and nothing is lost."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from support.folders import numbers, records, values, weights
from support.workers import WorkerGroup

Workers = Callable[[int], WorkerGroup]
OBSERVE = "support.runs.observe"


def settings(dataset: Path, directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """20 steps on two stages with a checkpoint every 10 steps; ``sections`` add to its configuration."""
    configuration = values(dataset, directory, pipeline_stages=2)
    for section, keys in sections.items():
        configuration[section] = {**configuration.get(section, {}), **keys}
    return configuration


def observe(workers: Workers, size: int = 2, **arguments: Any) -> tuple[str, str]:
    """The error line, which is the same on all ranks, and the output of rank 0."""
    results = workers(size).run(OBSERVE, **arguments)
    assert len({error for error, _ in results}) == 1, results
    assert all(not said for _, said in results[1:]), "only rank 0 prints"
    return results[0]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(workers: Workers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    directory = tmp_path_factory.mktemp("straight")
    assert observe(workers, values=settings(dataset, directory))[0] == ""
    return directory


def assert_same(run: Path, reference: Path) -> None:
    assert numbers(run) == numbers(reference)
    ours, theirs = weights(run, 20), weights(reference, 20)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "rank", "step", "asynchronous"),
    [(signal.SIGTERM, 1, 7, False), (signal.SIGUSR1, 0, 13, True), (signal.SIGTERM, 0, 10, True)],
)
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(
    workers: Workers,
    dataset: Path,
    straight: Path,
    tmp_path: Path,
    number: int,
    rank: int,
    step: int,
    asynchronous: bool,
) -> None:
    """In a step with and without a checkpoint, which is written in the background or not."""
    changed = settings(dataset, tmp_path, checkpoint={"asynchronous": asynchronous})
    event = {"do": "signal", "signal": number, "rank": rank, "step": step}
    error, said = observe(workers, values=changed, events=[event])
    word = signal.Signals(number).name
    assert error == "" and said.splitlines()[-1] == (
        f"stopped by {word} at step {step}: saved {tmp_path}/checkpoints/global_step{step}; the same command resumes from there"
    )
    assert said.count(f"saved {tmp_path}/checkpoints/global_step{step} in") == 1 and "validation loss:" not in said
    assert (
        records(tmp_path)[-1]["step"] == step
        and (tmp_path / "checkpoints/latest").read_text() == f"global_step{step}\n"
    )
    error, said = observe(workers, values=changed)
    assert error == "" and f"resumed from step {step} " in said
    assert_same(tmp_path, straight)


def test_a_signal_while_saving_stops_after_the_save(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    event = {"do": "signal while saving", "rank": 1, "step": 10}
    error, said = observe(workers, values=settings(dataset, tmp_path), events=[event])
    assert error == "" and "stopped by SIGTERM at step 10: saved" in said
    assert records(tmp_path)[-1]["step"] == 10 and names(tmp_path) == ["global_step10", "latest"]


def test_deepspeeds_own_schedule_stops_and_is_checked_too(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    changed = settings(dataset, tmp_path, pipeline={"engine": "stock"})
    error, said = observe(workers, values=changed, events=[{"do": "signal", "rank": 1, "step": 3}])
    assert error == "" and "stopped by SIGTERM at step 3: saved" in said
    error, said = observe(workers, values=changed, per_rank={1: {"data": {"seed": 7}}})
    assert error.startswith(f"{tmp_path}/checkpoints/global_step3 is of another run (data.seed: 0 there, 7 here)")
    shutil.rmtree(tmp_path / "checkpoints")
    error, _ = observe(workers, values=changed, per_rank={1: {"data": {"seed": 7}}})
    assert error.startswith("step 1: two stages of replica 0 read different tokens for ")


def test_what_a_crash_left_in_the_records_is_said_once(
    workers: Workers, dataset: Path, straight: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 21, "lo')
    error, said = observe(workers, values=settings(dataset, run))
    assert error == "" and said.count(f"{run}/metrics.jsonl: 2 unreadable line(s) dropped, left by a crash\n") == 1
    assert numbers(run) == numbers(straight)


# -- skipped updates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_loss_that_is_not_finite_is_skipped_and_its_samples_are_named(
    workers: Workers, dataset: Path, tmp_path: Path, zero_stage: int
) -> None:
    """On one replica of two, once with gradients that are not finite, and once with finite ones."""
    from lime_dist.data.dataset import TokenSplit
    from lime_dist.data.order import SampleOrder

    changed = settings(dataset, tmp_path, train={"steps": 6}, parallel={"zero_stage": zero_stage})
    events = [
        {"do": "loss", "rank": 3, "step": 3, "micro_batch": 1, "poison": True},
        {"do": "loss", "rank": 1, "step": 5, "micro_batch": 0, "add": math.inf},
    ]
    error, said = observe(workers, 4, values=changed, events=events)
    order = SampleOrder(0, TokenSplit(dataset, "train").num_samples(16))
    lines = [line for line in said.splitlines() if "skipped" in line]
    assert error == "" and len(lines) == 2
    assert lines[0] == (
        "step 3: loss nan, gradient norm nan; this update was skipped on all ranks; "
        f"micro-batch 1 of replica 1 has loss nan (sample {order.sample_at(8 + 3)})"
    )
    assert lines[1] == (
        "step 5: loss inf, gradient norm nan; this update was skipped on all ranks; "
        f"micro-batch 0 of replica 0 has loss inf (sample {order.sample_at(16)})"
    )
    manifest = json.loads((tmp_path / "checkpoints/global_step6/manifest.json").read_text())
    assert manifest["state"]["step"] == 6 and manifest["optimizer_steps"] == 4
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path, 6).values())


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_parameters_are_named_if_every_loss_is_finite(
    workers: Workers, dataset: Path, tmp_path: Path, zero_stage: int
) -> None:
    """A gradient that overflows on one stage of one replica, and weights that a huge learning rate has ruined."""
    changed = settings(dataset, tmp_path / "a", train={"steps": 4}, parallel={"zero_stage": zero_stage})
    event = {"do": "gradient", "rank": 2, "step": 3, "of": "model.layers.0.mlp.up_proj.weight"}
    error, said = observe(workers, 4, values=changed, events=[event])
    (line,) = [line for line in said.splitlines() if "skipped" in line]
    named = "every loss is finite, but the gradient of model.layers.0.mlp.up_proj.weight is not (samples "
    assert error == "" and re.match(r"step 3: loss [\d.]+, gradient norm inf; ", line) and named in line
    changed = settings(
        dataset, tmp_path / "b", train={"max_consecutive_skips": 2}, optimizer={"lr": 1e30, "router_lr": 1e30}
    )
    error, said = observe(workers, 2, values=changed)
    assert "2 updates in a row were skipped" in error and "more parameters" in error
    assert "though each gradient is finite" not in error, error


def test_too_many_skips_in_a_row_end_the_run(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """Two skips in a row are allowed, three are not. A checkpoint that is still being written is finished."""
    changed = settings(dataset, tmp_path, train={"max_consecutive_skips": 3}, checkpoint={"asynchronous": True})
    events = [{"do": "loss", "step": step, "poison": True} for step in (5, 6, 9, 10, 11)]
    events.append({"do": "slow disk", "step": 10, "seconds": 0.5, "rank": 1})
    error, said = observe(workers, values=changed, events=events)
    assert error.startswith(
        "step 11: 3 updates in a row were skipped (train.max_consecutive_skips=3), the last one because"
    )
    assert "micro-batch 0 of replica 0 has loss nan" in error and "lower optimizer.lr" in error
    assert said.count("skipped on all ranks") == 5 and names(tmp_path) == ["global_step10", "latest"]


# -- spikes ---------------------------------------------------------------------------------------------------------------


def test_a_spike_goes_back_and_skips_the_data(workers: Workers, dataset: Path, straight: Path, tmp_path: Path) -> None:
    """From step 14 back to step 10, continuing with the samples after step 14's; the records have each step once."""
    changed = settings(dataset, tmp_path, train={"spike_factor": 2.0, "log_interval": 10})
    events = [{"do": "loss", "step": 14, "add": 20.0}]
    # Step 14 is taken twice; only the first time its loss is changed.
    error, said = observe(workers, values=changed, events=[{**events[0], "once": True}])
    assert error == "" and "step 14: the loss jumped to " in said
    assert (
        f"back to step 10 ({tmp_path}/checkpoints/global_step10), continuing after the 56 samples consumed so far"
        in said
    )
    actual, reference = numbers(tmp_path), numbers(straight)
    assert [record["step"] for record in actual] == [record["step"] for record in reference], "each step once"
    before = [record for record in reference if record["step"] <= 10]
    assert actual[: len(before)] == before
    assert [r["consumed_samples"] for r in actual if r["step"] > 10 and "loss" in r] == list(range(60, 100, 4))
    assert all(record["loss"] < 10 for record in actual if "loss" in record)
    losses = [r["loss"] for r in reference if 10 < r["step"] < 14 and "loss" in r]
    losses += [r["loss"] for r in actual if r["step"] > 10 and "loss" in r]
    printed = float(said.split("step 20/20 | loss ")[1].split(" ")[0])
    assert printed == pytest.approx(fmean(losses), abs=1e-4), "the mean since step 10 leaves out the spike"
    first = next(record for record in actual if record["step"] == 11)
    same = next(record for record in reference if record["step"] == 11)
    assert first["lr"] == same["lr"] and first["loss"] != same["loss"], (
        "the learning-rate schedule goes back, the data do not"
    )


def test_repeated_spikes_end_the_run(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    changed = settings(dataset, tmp_path, train={"spike_factor": 2.0})
    error, said = observe(workers, values=changed, events=[{"do": "loss", "step": 11, "add": 20.0}])
    assert said.count("; back to step 10") == 3
    assert "again after going back 3 times without a new best" in error
    assert names(tmp_path) == ["global_step10", "latest"]


def test_a_spike_before_the_first_checkpoint_is_ignored(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    changed = settings(dataset, tmp_path, train={"spike_factor": 2.0, "steps": 10})
    error, said = observe(workers, values=changed, events=[{"do": "loss", "step": 9, "add": 20.0}])
    assert error == "" and "there is no checkpoint to go back to" in said and records(tmp_path)[-1]["step"] == 10


# -- saving in the background, and on a full disk -------------------------------------------------------------------------


def test_saving_in_the_background_changes_nothing_and_steps_go_on(
    workers: Workers, dataset: Path, straight: Path, tmp_path: Path
) -> None:
    """One rank has a slow disk. Training continues; the next save, and the end of the run, wait for the one before."""
    changed = settings(dataset, tmp_path, train={"checkpoint_interval": 6}, checkpoint={"asynchronous": True})
    events = [{"do": "slow disk", "rank": 1, "step": step, "seconds": 0.8} for step in (6, 20)]
    error, said = observe(workers, values=changed, events=events)
    assert error == ""
    lines = said.splitlines()
    saved = [line for line in lines if "| saved" in line]
    assert [line.split(" in ")[0].rpartition("_step")[2] for line in saved] == ["6", "12", "18", "20"]
    assert 6 < int(saved[0].split("/")[0].removeprefix("step ")) <= 12, (
        "training took more steps before it was finished"
    )
    assert " in the background in " in saved[0] and "; training waited 0." in saved[0]
    assert_same(tmp_path, straight)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_refuses_a_checkpoint(
    workers: Workers, dataset: Path, straight: Path, tmp_path: Path, on_error: str, asynchronous: bool
) -> None:
    """On rank 1, while rank 0 publishes checkpoints: the earlier checkpoint stays, and nothing half-written is left."""
    changed = settings(
        dataset, tmp_path, train={"checkpoint_interval": 6},
        checkpoint={"on_error": on_error, "asynchronous": asynchronous},
    )  # fmt: skip
    error, said = observe(workers, values=changed, events=[{"do": "no room", "rank": 1, "step": 12}])
    problem = "cannot write the checkpoint of step 12: [Errno 27] File too large; earlier checkpoints are untouched"
    if on_error == "continue":
        assert error == "" and f"{problem}; training continues (checkpoint.on_error: continue)" in said
        assert names(tmp_path) == ["global_step18", "global_step20", "global_step6", "latest"]
    else:
        assert error == problem and names(tmp_path) == ["global_step6", "latest"]
        error, said = observe(workers, values=changed)
        assert error == "" and "resumed from step 6 " in said
    assert_same(tmp_path, straight)


def test_failing_to_save_the_last_checkpoint_is_always_an_error(
    workers: Workers, dataset: Path, tmp_path: Path
) -> None:
    changed = settings(dataset, tmp_path, checkpoint={"on_error": "continue"})
    error, _ = observe(workers, values=changed, events=[{"do": "no room", "rank": 0, "step": 20}])
    assert error.startswith("cannot write the checkpoint of step 20: ") and names(tmp_path) == [
        "global_step10",
        "latest",
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 1.5 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_is_full_for_everything(
    workers: Workers, dataset: Path, straight: Path, small_disk: Path, on_error: str
) -> None:
    """The disk is full from step 8 on. With ``continue`` it has room again before step 16, and no record is missing."""
    often = {"checkpoint_interval": 6, "log_interval": 1}  # enough records to fill more than a block of the file system
    changed = settings(dataset, small_disk / "run", train=often, checkpoint={"on_error": on_error})
    ballast = {"do": "file", "rank": 0, "path": str(small_disk / "ballast")}
    events = [{**ballast, "step": 8, "size": 2 << 20}, {**ballast, "step": 16, "size": 0}]
    error, said = observe(workers, values=changed, events=events)
    full = rf"{small_disk}/run/\S+ cannot be written: \[Errno 28\] No space left on device"
    if on_error == "stop":
        assert re.fullmatch(
            rf"{full}; the same command resumes from the newest checkpoint \(checkpoint.on_error: stop\)", error
        )
        assert names(small_disk / "run") == ["global_step6", "latest"]
        (small_disk / "ballast").unlink()
        assert observe(workers, values=changed)[0] == ""
    else:
        assert error == "" and len(re.findall(full, said)) in (1, 2), "one line a file"
        assert said.count("records are written again") == 1
        assert "step 12: cannot write the checkpoint of step 12: [Errno 28]" in said
        assert names(small_disk / "run") == ["global_step18", "global_step20", "global_step6", "latest"]
    assert_same(small_disk / "run", straight)


# -- both ends read the same ----------------------------------------------------------------------------------------------


def test_stages_that_read_different_tokens_end_the_run(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """The last stage of replica 1 has a shard in which one token differs."""
    import numpy as np

    from lime_dist.data.dataset import TokenSplit
    from lime_dist.data.order import SampleOrder

    other = tmp_path / "shards"
    shutil.copytree(dataset, other)
    order = SampleOrder(0, TokenSplit(dataset, "train").num_samples(16))
    sample = order.sample_at(4 * 4 + 3)  # step 5; replica 1's second micro-batch of one sample
    (shard,) = other.glob("train*.bin")
    tokens = np.fromfile(shard, dtype="<u2")
    tokens[sample * 16 + 5] += 1
    tokens.tofile(shard)
    changed = settings(dataset, tmp_path / "run", train={"checkpoint_interval": 4})
    error, _ = observe(workers, 4, values=changed, per_rank={3: {"data": {"path": str(other)}}})
    host = socket.gethostname()
    assert error.startswith(
        f"step 5: two stages of replica 1 read different tokens for sample {sample} (micro-batch 1), "
        f"stage 0 from {dataset} on {host} and stage 1 from {other} on {host}; "
    ), error
    assert names(tmp_path / "run") == ["global_step4", "latest"]
