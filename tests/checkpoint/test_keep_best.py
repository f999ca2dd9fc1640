"""Protects the best checkpoint: it is never pruned, survives a resume, gives way only to a better one, and can be exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.folders import records, values
from support.workers import WorkerGroup

from lime_dist.checkpoint.manifest import read_best
from lime_dist.checkpoint.reading import find_checkpoint
from lime_dist.errors import LimeError


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_checkpoint_is_kept(
    workers: Callable[[int], WorkerGroup], dataset: Path, tmp_path: Path, asynchronous: bool
) -> None:
    """A learning rate that destroys the model makes later validations worse."""
    settings: dict[str, Any] = values(dataset, tmp_path / "run", steps=8, pipeline_stages=2)
    settings["checkpoint"] = {"asynchronous": asynchronous}
    settings["train"] |= {"evaluation_interval": 2, "checkpoint_interval": 3, "keep_last": 1, "keep_best": True}
    assert set(workers(2).run("support.runs.run", values=settings)) == {""}
    folder = tmp_path / "run/checkpoints"

    def best_of_records() -> tuple[int, float]:
        losses = [(r["validation_loss"], int(r["step"])) for r in records(tmp_path / "run") if "validation_loss" in r]
        loss, step = min(losses)
        return step, loss

    first = read_best(folder)
    assert first == best_of_records() and (folder / f"global_step{first[0]}").is_dir()
    settings["train"] |= {"steps": 20}
    settings["optimizer"] |= {"lr": 10.0, "router_lr": 10.0}
    assert set(workers(2).run("support.runs.run", values=settings)) == {""}
    assert read_best(folder) == first == best_of_records(), "worse ones do not take its place"
    kept = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert kept == sorted({f"global_step{first[0]}", "global_step20"})
    assert find_checkpoint(folder / "best") == folder / f"global_step{first[0]}"


def test_what_best_may_say(tmp_path: Path) -> None:
    for text in ("", "global_step5", "global_step5 x", "\x00\x00"):
        (tmp_path / "best").write_text(text)
        assert read_best(tmp_path) is None
    (tmp_path / "best").write_text("global_step5 2.5\n")
    assert read_best(tmp_path) is None, "its folder is gone"
    with pytest.raises(LimeError, match=r"train\.keep_best=true writes it"):
        find_checkpoint(tmp_path / "best")
    (tmp_path / "global_step5").mkdir()
    assert read_best(tmp_path) == (5, 2.5)
