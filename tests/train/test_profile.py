"""Tests of ``--profile``: the traces name what the pipeline did, and training does not notice them."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.folders import numbers, values
from support.workers import WorkerGroup

from lime_dist.errors import LimeError
from lime_dist.train.steps import Steps

Workers = Callable[[int], WorkerGroup]


@pytest.mark.parametrize("engine", ["overlap", "stock"])
def test_traces_of_two_steps(workers: Workers, dataset: Path, tmp_path: Path, engine: str) -> None:
    for directory, profile in ((tmp_path / "plain", None), (tmp_path / "profiled", "2-3")):
        run = values(dataset, directory, steps=4, pipeline_stages=2)
        run["pipeline"] = {"engine": engine}
        results = workers(2).run("support.runs.observe", values=run, profile=profile)
        assert {error for error, _ in results} == {""}, results
    assert numbers(tmp_path / "profiled") == numbers(tmp_path / "plain")
    folder = tmp_path / "profiled/profile/steps2-3"
    for rank in range(2):
        events = json.loads(gzip.decompress((folder / f"rank{rank}.json.gz").read_bytes()))["traceEvents"]
        names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
        for micro_batch in range(4):
            for kind in ("ForwardPass", "BackwardPass", "RecvActivation" if rank else "SendActivation"):
                assert names[f"{kind} of micro-batch {micro_batch}"] == 2, "once a step"
        assert names["OptimizerStep"] == 2 and any(event["name"] == "aten::mm" for event in events)
    summary = (folder / "summary.md").read_text()
    row = re.search(r"^\| 1 \| 1 \| 0 \| (\d\.\d+) \|", summary, re.MULTILINE)
    assert row and float(row[1]) > 0 and summary.count("aten::mm") >= 2
    assert f"profile of steps 2-3: {folder / 'summary.md'}; the traces beside it open in Perfetto" in results[0][1]


def test_a_disk_that_refuses_the_traces_does_not_stop_training(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    run = values(dataset, tmp_path / "run", steps=3, pipeline_stages=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile").write_text("a file")
    ((error, said), _) = workers(2).run("support.runs.observe", values=run, profile="1")
    assert error == "" and re.search(
        "pretrain.py --profile: .*rank0.json.gz cannot be written: .*; training continues", said
    )


@pytest.mark.parametrize(("steps", "recorded"), [("9-12", 4), ("14-15", 2), ("12-14", 3)])
def test_a_spike_within_the_steps(workers: Workers, dataset: Path, tmp_path: Path, steps: str, recorded: int) -> None:
    """From step 14 back to step 10: steps that come again are recorded anew if the first of them comes again."""
    run = values(dataset, tmp_path, steps=16)
    run["train"] |= {"spike_factor": 2.0, "evaluation_interval": 0, "evaluation_samples": 0}
    events = [{"do": "loss", "step": 14, "add": 20.0, "once": True}]
    ((error, said),) = workers(1).run("support.runs.observe", values=run, events=events, profile=steps)
    assert error == "" and "back to step 10" in said
    trace = tmp_path / f"profile/steps{steps}/rank0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert names["OptimizerStep"] == recorded


def test_a_stop_within_the_steps_says_that_there_is_no_profile(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    run = values(dataset, tmp_path, steps=6)
    events = [{"do": "signal", "step": 3}]
    ((error, said),) = workers(1).run("support.runs.observe", values=run, events=events, profile="2-5")
    assert error == "" and "no profile of steps 2-5: the run was stopped before step 5" in said
    assert not (tmp_path / "profile").exists()
    ((error, _),) = workers(1).run("support.runs.observe", values=run, profile="5")
    assert error == "" and (tmp_path / "profile/steps5/summary.md").exists(), "no other profile is open"


@pytest.mark.parametrize("text", ["", "0", "3-2", "a", "1-2-3", "-1"])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(LimeError, match=f"^pretrain.py --profile {text}: give a step or a range"):
        Steps.parse(text)


@pytest.mark.parametrize("text", ["5", "5-6", "9-11"])
def test_steps_that_a_start_does_not_make(text: str) -> None:
    with pytest.raises(LimeError, match="this start makes steps 6 to 10"):
        Steps.parse(text).check(5, 10)
    Steps.parse("6-10").check(5, 10)
