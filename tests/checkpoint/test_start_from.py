"""Tests of a new run that starts from a checkpoint of another one: ``run.start_from``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints
from support.folders import numbers, values
from support.workers import WorkerGroup

from lime_dist.checkpoint.source import why_not_startable
from lime_dist.config.load import load_config, make_config
from lime_dist.data.identity import DataIdentity
from lime_dist.errors import LimeError

Workers = Callable[[int], WorkerGroup]


@pytest.fixture(scope="module")
def source(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 5 and 9, written by two stages, whose values say of which step they are."""
    folder = tmp_path_factory.mktemp("source")
    assert (
        workers(2).run(
            "support.checkpoints.save",
            values=checkpoints.settings(2),
            directory=str(folder / "checkpoints"),
            steps=[5, 9],
        )
        == [["", ""]] * 2
    )
    return folder


def settings(directory: Path, start_from: object, **sections: Any) -> dict[str, Any]:
    run = {"directory": str(directory), "start_from": str(start_from), **sections.pop("run", {})}
    return checkpoints.settings(1, run=run, **sections)


def start(workers: Workers, *arguments: Any, **sections: Any) -> tuple[str, int, int, dict[str, float]]:
    (result,) = workers(1).run("support.checkpoints.start_from", values=settings(*arguments, **sections))
    return result


def test_a_run_starts_where_its_source_was(workers: Workers, source: Path, tmp_path: Path) -> None:
    for start_from, step in ((source, 9), (f"{source}@5", 5), (source / "checkpoints/global_step5", 5)):
        problem, begin, updates, state = start(workers, tmp_path, start_from)
        assert (problem, begin, updates) == ("", step, step)
        assert state["exp_avg"] == state["weight"] + 1000 and state["exp_avg_sq"] == state["weight"] + 2000


def test_the_weights_alone_begin_at_step_0(workers: Workers, source: Path, tmp_path: Path) -> None:
    _, _, _, whole = start(workers, tmp_path, source)
    problem, begin, updates, state = start(workers, tmp_path, source, run={"start_weights_only": True})
    assert (problem, begin, updates) == ("", 0, 0)
    assert state == {"weight": whole["weight"], "exp_avg": 0.0, "exp_avg_sq": 0.0}


@pytest.mark.parametrize(
    ("start_from", "sections", "expected"),
    [
        ("{source}@7", {}, "no checkpoint of that step in {source}/checkpoints; there are: 5, 9"),
        ("{source}/none", {}, "run.start_from={source}/none: {source}/none: no checkpoint there"),
        ("{source}", {"data": {"sequence_length": 8}}, "data.sequence_length: 4 there, 8 here); give another run.start_from"),
        ("{source}", {"train": {"global_batch_size": 4, "micro_batch_size": 2}, "model": {"vocab_size": 13}}, "model.vocab_size: 11 there, 13 here"),
    ],
)  # fmt: skip
def test_a_source_that_does_not_fit_is_one_line_here_and_in_the_doctor(
    workers: Workers, source: Path, tmp_path: Path, start_from: str, sections: dict[str, Any], expected: str
) -> None:
    expected, start_from = (text.format(source=source) for text in (expected, start_from))
    if "model" in sections:
        sections = {**sections, "model": {**checkpoints.settings()["model"], **sections["model"]}}
    problem, *_ = start(workers, tmp_path, start_from, **sections)
    assert expected in problem and "\n" not in problem
    config = make_config(settings(tmp_path, start_from, **sections), "a test")
    assert why_not_startable(config, DataIdentity(checkpoints.NUM_SAMPLES)) == problem


def test_other_data_are_for_the_weights_alone(workers: Workers, source: Path, tmp_path: Path) -> None:
    other = {"data": {"sequence_length": 8}}
    problem, begin, *_ = start(workers, tmp_path, source, run={"start_weights_only": True}, **other)
    assert (problem, begin) == ("", 0)


def test_a_damaged_source_is_refused(workers: Workers, source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    file = copy / "checkpoints/global_step9/stage000-replica000.pt"
    file.write_bytes(file.read_bytes()[:-1])
    problem, *_ = start(workers, tmp_path / "new", copy)
    assert problem.startswith(f"{copy}/checkpoints/global_step9: {file.name} is damaged; ") and "RUN@STEP" in problem


def test_weights_only_needs_a_source() -> None:
    with pytest.raises(LimeError, match="run.start_weights_only=true needs run.start_from"):
        load_config(None, ["run.start_weights_only=true"])


def test_a_branch_equals_the_run_that_it_leaves(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """With a constant learning rate, then with a decay at its end; and it resumes by itself, without its source."""
    first, branch, straight = (tmp_path / name for name in ("first", "branch", "straight"))

    def of(directory: Path, steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
        run = values(dataset, directory, steps=steps)
        run["optimizer"] |= {"schedule": "constant"}
        run["train"] |= {"checkpoint_interval": 3}
        for name, keys in sections.items():
            run[name] |= keys
        return run

    group = workers(1)
    assert group.run("support.runs.run", values=of(first, 3)) == [""]
    assert group.run("support.runs.run", values=of(straight, 8)) == [""]
    leaving = of(branch, 6, run={"start_from": f"{first}@3"})
    ((problem, said),) = group.run("support.runs.observe", values=leaving)
    assert problem == "" and f"started from step 3 ({first}/checkpoints/global_step3)\n" in said
    assert f"  run.start_from: null → {first}@3\n" in said
    steps, expected = ([record for record in numbers(run) if "loss" in record] for run in (branch, straight))
    assert steps == [record for record in expected if 3 < record["step"] <= 6]
    shutil.rmtree(first)
    decaying = of(branch, 8, run={"start_from": f"{first}@3"}, optimizer={"schedule": "wsd", "decay_share": 0.25})
    ((problem, said),) = group.run("support.runs.observe", values=decaying)
    assert problem == "" and f"resumed from step 6 ({branch}/checkpoints/global_step6)\n" in said
    assert "warning: the learning rate" not in said, "the decay begins at the rate of the stable run"
