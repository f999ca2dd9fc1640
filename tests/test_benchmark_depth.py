"""Tests of the comparison of memories over depth: how it chooses, and what its table says of given runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import pairs

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # the scripts import each other from their folder

from benchmarks import depth  # noqa: E402  # needs that folder
from benchmarks.runs import Study  # noqa: E402  # likewise

SEEDS = [1, 2, 3]


def write(study: Study, name: str, seed: int, losses: dict[int, float]) -> None:
    folder = study.folder(name, seed)
    folder.mkdir(parents=True)
    records = [{"step": step, "tokens": 1024 * step, "validation_loss": loss} for step, loss in losses.items()]
    records.append({"step": 8, "tokens": 8192, "loss": 1.0, "step_seconds": 2.0 if "full" in name else 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def study(tmp_path: Path) -> tuple[Study, dict[str, depth.Setting]]:
    chosen = {name: depth.Setting(name, 1e-3, multiple) for name, multiple in (("llama", 1.0), ("lime-full", 3.0))}
    variants = {one.name: one.overrides for one in chosen.values()}
    return Study(ROOT / "configs/quickstart.yaml", tmp_path, depth.SIZE, variants, SEEDS, 8), chosen


def test_only_models_with_routers_sweep_their_learning_rate() -> None:
    assert [name for name in ("llama", "lime-full", "lime-chunked", "value-residual") if depth.has_routers(name)] == [
        "lime-full", "lime-chunked",
    ]  # fmt: skip


def test_the_lowest_loss_chooses_the_setting(study: tuple[Study, dict[str, depth.Setting]]) -> None:
    settings = [depth.Setting("lime-full", lr, 3.0) for lr in (5e-4, 1e-3, 2e-3)]
    sweep = replace(study[0], variants={one.name: one.overrides for one in settings})
    for one, loss in zip(settings[:2], (3.0, 2.5), strict=True):
        write(sweep, one.name, 0, {8: loss})
    with pytest.raises(Exception, match="lime-full-lr0.002-x3 has not finished"):
        depth.best(sweep, settings, 0)
    write(sweep, settings[2].name, 0, {8: 2.7})
    assert depth.best(sweep, settings, 0) == settings[1]
    diverged = depth.Setting("lime-full", 4e-3, 3.0)
    write(sweep, diverged.name, 0, {8: float("nan")})
    assert depth.best(sweep, [diverged, *settings], 0) == settings[1], "nan is no loss below the others"


def test_the_table_pairs_by_seed(study: tuple[Study, dict[str, depth.Setting]]) -> None:
    """Each seed moves both models alike, so that the small difference is resolved though the seeds differ more."""
    runs, chosen = study
    for seed, shift in zip(SEEDS, (0.0, 0.5, 1.0), strict=True):
        write(runs, chosen["llama"].name, seed, {4: 4.0 + shift, 8: 3.0 + shift})
        write(runs, chosen["lime-full"].name, seed, {4: 3.0 + shift, 8: 2.9 + shift + 0.001 * seed})
    table = depth.make_table(runs, chosen, SEEDS)
    cells = [cell.strip() for cell in table.splitlines()[3].split("|")]
    assert cells[1:3] == ["lime-full", "0.001, 0.003"] and cells[3].startswith("3.4020 ±")
    assert cells[4].startswith("-0.0980 [") and cells[4].endswith("better") and cells[5] == ""
    assert cells[8] == "2.00" and cells[9] == "24", "32 layers: every slot before the last quarter crosses"
    assert cells[10] == "4,096", "the tokens at which its mean curve has reached LLaMA's last loss"
    assert depth.difference([1.0, 2.0], [1.1, 1.8], 1).endswith("not resolved")


def test_intervals_widen_with_the_number_of_comparisons() -> None:
    """Student's quantiles with 2 degrees of freedom: 4.303 at 97.5 %, 9.925 at 99.5 %."""
    assert pairs.t_quantile(2) == pytest.approx(4.303, abs=2e-3)
    (low, high), (wide, _) = pairs.mean_interval([0.0, 1.0, 2.0]), pairs.mean_interval([0.0, 1.0, 2.0], 5)
    assert high - 1 == pytest.approx(4.303 / 3**0.5, abs=2e-3) and 1 - wide == pytest.approx(9.925 / 3**0.5, abs=2e-2)
    assert low == pytest.approx(2 - high)
