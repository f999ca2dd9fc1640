"""Tests of the comparison of memories over depth: how it chooses, what it keeps, and what its tables say of given runs."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import pairs
from lime_dist import load_config
from lime_dist.errors import LimeError
from lime_dist.model.cost import count_parameters

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # the scripts import each other from their folder

# isort: split
import depth  # noqa: E402  # needs that folder
import depth_or_width  # noqa: E402  # likewise
import depth_table  # noqa: E402  # likewise
import kept  # noqa: E402  # likewise
from memories import Setting, Sweep, has_routers  # noqa: E402  # likewise
from runs import Study  # noqa: E402  # likewise

SEEDS = [1, 2, 3]
CONFIG = ROOT / "configs/quickstart.yaml"
Losses = dict[int, float]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study that starts no run: it has what :func:`keep` has written."""
    return Study(CONFIG, tmp_path, [*depth.SIZE, "train.steps=8"], {}, SEEDS, 8, kept.KeptRuns(tmp_path / "runs.jsonl", "data"), True)  # fmt: skip


def keep(study: Study, setting: Setting, seed: int, losses: Losses) -> None:
    assert study.kept is not None
    records = [{"step": step, "tokens": 1024 * step, "validation_loss": loss} for step, loss in losses.items()]
    config = replace(study, variants={setting.name: setting.overrides}).model(setting.name)
    study.kept.add(setting.name, config, seed, [*records, {"step": 8, "tokens": 8192, "loss": 1.0}])


def test_only_models_with_routers_sweep_their_learning_rate() -> None:
    assert [name for name in ("llama", "lime-full", "lime-chunked", "value-residual") if has_routers(name)] == [
        "lime-full", "lime-chunked",
    ]  # fmt: skip


def test_a_sweep_goes_on_while_the_best_is_at_an_end(study: Study) -> None:
    """LLaMA's best is in the middle; LIMe's lies above the highest given, and its routers like another multiple."""
    sweep = Sweep(study, [("llama", ()), ("lime-full", ())], [1e-3, 2e-3, 4e-3], [3.0, 1.0], seed=0)
    for lr, loss in ((1e-3, 3.0), (2e-3, 2.5), (4e-3, float("nan"))):
        keep(study, Setting("llama", lr), 0, {8: loss})
    for lr, loss in ((1e-3, 3.0), (2e-3, 2.9), (4e-3, 2.8), (8e-3, 2.7)):
        keep(study, Setting("lime-full", lr, 3.0), 0, {8: loss})
    with pytest.raises(LimeError, match="lime-full-lr0.016-x3-seed0 is not among the finished runs; give --data"):
        sweep.run(1)
    keep(study, Setting("lime-full", 1.6e-2, 3.0), 0, {8: 2.75})
    keep(study, Setting("lime-full", 8e-3, 1.0), 0, {8: 2.6})
    llama, lime = sweep.run(1)
    assert (llama, lime) == (Setting("llama", 2e-3), Setting("lime-full", 8e-3, 1.0)), "nan is no loss below the others"
    table = depth_table.sweep_table(sweep).splitlines()
    assert table[0] == "| model, routers' multiple | 0.001 | 0.002 | 0.004 | 0.008 | 0.016 |"
    assert table[2:] == [
        "| llama, 1 | 3.0000 | **2.5000** | nan |  |  |",
        "| lime-full, 3 | 3.0000 | 2.9000 | 2.8000 | 2.7000 | 2.7500 |",
        "| lime-full, 1 |  |  |  | **2.6000** |  |",
    ]
    assert not sweep.at_an_end(llama) and not sweep.at_an_end(lime)
    assert sweep.at_an_end(replace(lime, lr=1.6e-2))


def test_a_learning_rate_with_a_spike_is_not_chosen(study: Study) -> None:
    """One run at the best rate spiked and recovered only with one multiple: the rate below is taken; half of it and the multiples are tried too."""
    sweep = Sweep(study, [("lime-full", ())], [1e-3, 2e-3], [3.0, 1.0], seed=0)
    calm, spiked = {2: 4.0, 4: 4.05, 8: 3.0}, {2: 4.0, 4: 4.2, 8: 2.9}
    keep(study, Setting("lime-full", 1e-3, 3.0), 0, calm)
    keep(study, Setting("lime-full", 2e-3, 3.0), 0, {**calm, 8: 2.5})
    keep(study, Setting("lime-full", 4e-3, 3.0), 0, {**calm, 8: 2.7})
    keep(study, Setting("lime-full", 2e-3, 1.0), 0, spiked)
    with pytest.raises(LimeError, match="lime-full-lr0.0005-x3-seed0 is not among the finished runs"):
        sweep.run(1)
    keep(study, Setting("lime-full", 5e-4, 3.0), 0, {**calm, 8: 3.3})
    with pytest.raises(LimeError, match="lime-full-lr0.001-x1-seed0 is not among the finished runs"):
        sweep.run(1)
    keep(study, Setting("lime-full", 1e-3, 1.0), 0, {**calm, 8: 3.1})
    assert sweep.run(1) == [Setting("lime-full", 1e-3, 3.0)]
    assert depth_table.sweep_table(sweep).splitlines()[2:] == [
        "| lime-full, 3 | 3.3000 | **3.0000** | 2.5000 | 2.7000 |",
        "| lime-full, 1 |  | 3.1000 | 2.9000, spike |  |",
    ]


@pytest.mark.parametrize("spiked", [{2: 4.0, 4: 4.2, 8: 2.0}, {4: float("nan"), 8: 2.0}, {8: float("nan")}])
def test_a_rate_above_one_with_a_spike_is_not_chosen_either(study: Study, spiked: Losses) -> None:
    sweep = Sweep(study, [("llama", ())], [1e-3, 2e-3, 4e-3, 8e-3], [3.0, 1.0], seed=0)
    for lr, losses in ((1e-3, {2: 4.0, 8: 3.5}), (2e-3, {2: 4.0, 8: 3.0}), (4e-3, spiked), (8e-3, {2: 4.0, 8: 2.5})):
        keep(study, Setting("llama", lr), 0, losses)
    assert sweep.run(1) == [Setting("llama", 2e-3)]


def test_if_every_rate_has_a_spike_lower_ones_are_tried(study: Study) -> None:
    """At most twice; then the lowest is taken."""
    sweep = Sweep(study, [("llama", ())], [2e-3, 4e-3], [3.0, 1.0], seed=0)
    for lr in (5e-4, 1e-3, 2e-3, 4e-3):
        keep(study, Setting("llama", lr), 0, {2: 4.0, 4: 4.2, 8: 2.0 + lr})
    assert sweep.run(1) == [Setting("llama", 5e-4)]
    assert depth_table.sweep_table(sweep).splitlines()[2].startswith("| llama, 1 | **2.0005**, spike | 2.0010, spike |")


def test_each_sweep_is_extended_at_most_twice_on_its_own(study: Study) -> None:
    """LLaMA likes ever higher rates at once; LIMe's best becomes the lowest only when its routers' other multiple has spiked."""
    sweep = Sweep(study, [("llama", ()), ("lime-full", ())], [1e-3, 2e-3, 4e-3], [3.0, 1.0], seed=0)
    for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
        keep(study, Setting("llama", lr), 0, {4: 4.0, 8: 3.0 - lr})
    for lr, loss in ((2.5e-4, 3.2), (5e-4, 2.8), (1e-3, 2.9), (2e-3, 2.5), (4e-3, 3.0)):
        keep(study, Setting("lime-full", lr, 3.0), 0, {4: 4.0, 8: loss})
    for lr, middle in ((2e-3, 5.0), (5e-4, 3.5)):
        keep(study, Setting("lime-full", lr, 1.0), 0, {2: 4.0, 4: middle, 8: 3.0})
    assert sweep.run(1) == [Setting("llama", 1.6e-2), Setting("lime-full", 5e-4, 3.0)]
    assert sweep.at_an_end(Setting("llama", 1.6e-2))


def test_an_unfinished_sweep_reports_what_has_ended(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No time was left: LLaMA's best is at an end, LIMe has not been trained."""
    sweep = Sweep(
        replace(study, only_reads=False, deadline=0.0), [("llama", ()), ("lime-full", ())], [1e-3, 2e-3], [3.0], seed=0
    )
    for lr in (1e-3, 2e-3):
        keep(study, Setting("llama", lr), 0, {8: 3.0 - lr})
    arguments = argparse.Namespace(seeds=[1, 2], sweep_seed=0, jobs=1)
    with pytest.raises(LimeError, match="lime-full-lr0.001-x3 has not finished; run the same command again"):
        depth.choose(sweep, arguments, "sweep.md")
    assert (tmp_path / "sweep.md").read_text().splitlines()[2:] == ["| llama, 1 | 2.9990 | **2.9980** |"]
    assert "lime-full-lr0.001-x3-seed0: not started, no time left" in capsys.readouterr().out
    with pytest.raises(LimeError, match="--sweep-seed 2 is among --seeds"):
        depth.choose(sweep, argparse.Namespace(seeds=[1, 2], sweep_seed=2, jobs=1), "sweep.md")


def test_a_run_is_kept_by_what_it_trains_and_on_what(study: Study, tmp_path: Path) -> None:
    """Folder, paths and seeds are no settings; learning rates and the data are."""
    setting, path = Setting("lime-full", 1e-3, 3.0), tmp_path / "runs.jsonl"
    keep(study, setting, 1, {4: 4.0, 8: 3.0})
    keep(study, setting, 1, {8: 2.0})
    assert len(path.read_text().splitlines()) == 1, "the first stays"
    shared = [*study.shared, *setting.overrides]
    here = kept.KeptRuns(path, "data")
    unlike = ["run.directory=/elsewhere", "data.path=/other", "data.seed=9", "train.seed=9", "train.log_interval=1"]
    moved = load_config(CONFIG, [*shared, *unlike])
    assert here.records(moved, 1) == [
        {"step": 4, "tokens": 4096, "validation_loss": 4.0}, {"step": 8, "tokens": 8192, "validation_loss": 3.0},
    ]  # fmt: skip
    assert not here.records(moved, 2)
    assert not here.records(load_config(CONFIG, [*shared, "optimizer.lr=2.0e-3"]), 1)
    assert not kept.KeptRuns(path, "other data").records(moved, 1)
    assert kept.only_data_digest(path) == "data"
    replace(here, data="other data").add("llama", moved, 1, [{"step": 8, "tokens": 8192, "validation_loss": 1.0}])
    with pytest.raises(LimeError, match="runs on 2 data sets; give --data"):
        kept.only_data_digest(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(LimeError, match="runs.jsonl is no file of finished runs: line 1 lacks one of run, seed"):
        kept.only_data_digest(path)
    with pytest.raises(LimeError, match="absent.jsonl is not there; give the --runs to read"):
        kept.only_data_digest(tmp_path / "absent.jsonl")
    path.write_text("{")
    with pytest.raises(LimeError, match="runs.jsonl is no file of finished runs"):
        here.records(moved, 1)


def test_data_are_known_by_their_sources_and_settings(tmp_path: Path) -> None:
    def facts(**changes: object) -> str:
        content = {"source": "/a", "inputs": [{"name": "x", "sha256": "1"}], "settings": {"eos": True, "tool_version": "1"}}  # fmt: skip
        (tmp_path / "dataset.json").write_text(json.dumps({**content, **changes}))
        return kept.data_digest(tmp_path)

    same = facts()
    assert facts(source="/b", settings={"eos": True, "tool_version": "2"}) == same
    assert facts(settings={"eos": False}) != same and facts(inputs=[{"name": "x", "sha256": "2"}]) != same
    with pytest.raises(LimeError, match="holds no data set"):
        kept.data_digest(tmp_path / "absent")


def test_the_table_pairs_by_seed(study: Study) -> None:
    """Each seed moves both models alike, so that the small difference is resolved though the seeds differ more."""
    chosen = {"llama": Setting("llama", 1e-3), "lime-full": Setting("lime-full", 1e-3, 3.0)}
    study = replace(study, variants={one.name: one.overrides for one in chosen.values()})
    for seed, shift in zip(SEEDS, (0.0, 0.5, 1.0), strict=True):
        keep(study, chosen["llama"], seed, {4: 4.0 + shift, 8: 3.0 + shift})
        keep(study, chosen["lime-full"], seed, {4: 3.0 + shift, 8: 2.9 + shift + 0.001 * seed})
    assert study.finished_seeds() == SEEDS
    costs = {"llama": depth_table.Cost(1.0, 1.0), "lime-full": depth_table.Cost(2.0, 1.25)}
    table = depth_table.make_table(study, chosen, SEEDS, costs, ["lime-full"])
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| lime-full")]
    learning, costing = rows
    assert learning[2] == "0.001, 0.003 (at an end)" and learning[3].startswith("3.4020 ±")
    assert learning[4].startswith("-0.0980 [") and learning[4].endswith("better") and learning[5] == ""
    assert learning[7] == "+0.0000", "twice the time: LIMe's loss after half the steps, 3.5, over LLaMA's last, 3.5"
    assert learning[8] == "4,096", "the tokens at which its mean curve has reached LLaMA's last loss"
    assert costing[4:7] == ["2.00", "1.25", "18"], "24 layers: every slot before the last quarter could cross"
    assert depth_table.difference([1.0, 2.0], [1.1, 1.8], 1).endswith("not resolved")


def test_losses_between_the_points_of_a_curve() -> None:
    curve = [(100, 4.0), (200, 3.0), (400, 2.0)]
    assert [depth_table.loss_at(curve, tokens) for tokens in (100, 150, 300, 400, 500)] == [4.0, 3.5, 2.5, 2.0, 2.0]
    assert math.isnan(depth_table.loss_at(curve, 50))


@pytest.mark.parametrize("layers", [12, 48, 96])
def test_deeper_models_are_narrower_at_equal_parameters(layers: int) -> None:
    base = [*depth.SIZE, "model.architecture=llama"]
    middle = load_config(CONFIG, base).model
    shaped = load_config(CONFIG, [*base, *depth_or_width.shape(middle, layers)]).model
    assert shaped.num_hidden_layers == layers and shaped.hidden_size == 16 * shaped.num_attention_heads
    assert count_parameters(shaped) == pytest.approx(count_parameters(middle), rel=2e-3)
    assert (shaped.hidden_size < middle.hidden_size) == (layers > middle.num_hidden_layers)


def test_too_deep_for_equal_parameters_is_refused() -> None:
    middle = load_config(CONFIG, [*depth.SIZE, "model.architecture=llama"]).model
    assert depth_or_width.shape(middle, middle.num_hidden_layers) == ()
    with pytest.raises(LimeError, match="--depths 2000: no size of the SwiGLU"):
        depth_or_width.shape(middle, 2000)
    with pytest.raises(LimeError, match="--depths 0 must be at least 1"):
        depth_or_width.shape(middle, 0)


def test_intervals_widen_with_the_number_of_comparisons() -> None:
    """Student's quantiles with 2 degrees of freedom: 4.303 at 97.5 %, 9.925 at 99.5 %."""
    assert pairs.t_quantile(2) == pytest.approx(4.303, abs=2e-3)
    (low, high), (wide, _) = pairs.mean_interval([0.0, 1.0, 2.0]), pairs.mean_interval([0.0, 1.0, 2.0], 5)
    assert high - 1 == pytest.approx(4.303 / 3**0.5, abs=2e-3) and 1 - wide == pytest.approx(9.925 / 3**0.5, abs=2e-2)
    assert low == pytest.approx(2 - high)


def test_a_model_of_which_every_run_diverged_has_no_best(study: Study) -> None:
    keep(study, Setting("llama", 1e-3), 0, {8: float("nan")})
    sweep = Sweep(study, [("llama", ())], [1e-3], [1.0], seed=0)
    sweep.run(1)
    assert depth_table.sweep_table(sweep).splitlines()[2] == "| llama, 1 | nan |"


def test_the_spread_of_one_seed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["depth.py", "--output", str(tmp_path), "--spread", "--seeds", "1"])
    with pytest.raises(LimeError, match="--spread compares seeds; give at least 2 --seeds"):
        depth.main()


def test_only_two_kept_runs_rose() -> None:
    """RESULTS.md says so of the rule about spikes."""
    rose = [
        (line["run"], line["seed"])
        for line in kept.read_lines(ROOT / "benchmarks/depth.jsonl")
        if any(after[-1] > before[-1] for before, after in itertools.pairwise(line["records"]))
    ]
    assert sorted(rose) == [("hyper-dynamic-lr0.032-x1", 0), ("hyper-dynamic-lr0.032-x3", 2)]


PUBLISHED = (ROOT / "benchmarks/RESULTS.md").read_text()
COMMANDS = re.findall(
    r"^python benchmarks/(depth(?:_or_width)?)\.py (.*--runs benchmarks/depth\.jsonl.*?)(?: +#.*)?$",
    PUBLISHED,
    re.MULTILINE,
)
MEASURED = [" at llama's time ", " seconds of forward, loss and backward over llama ", " peak memory over llama "]


def test_all_published_commands_are_known() -> None:
    assert len(COMMANDS) == PUBLISHED.count("--runs benchmarks/depth.jsonl") > 0


@pytest.mark.parametrize(("script", "options"), COMMANDS)
def test_the_published_tables_are_those_of_the_kept_runs(
    script: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table that a command of RESULTS.md writes without training is there as a whole, but for what is measured on a machine.

    Several commands share the table of the spread: each has some of its rows.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(options), "--output", str(tmp_path)])
    monkeypatch.setattr(depth, "measure_costs", lambda study, chosen: dict.fromkeys(chosen, depth_table.Cost(1.0, 1.0)))
    monkeypatch.setattr(depth, "draw", lambda *_: None)
    {"depth": depth, "depth_or_width": depth_or_width}[script].main()
    written = [(path.name, table) for path in tmp_path.glob("*.md") for table in tables(path.read_text())]
    assert written and all(len(table) > 2 for _, table in written)
    published = tables(PUBLISHED)
    for name, table in written:
        assert any(set(table) <= set(one) if name == "spread.md" else table == one for one in published), table


def tables(text: str) -> list[list[str]]:
    """Return the tables of a text as lists of rows, without the columns of :data:`MEASURED`."""
    found = []
    for table in re.findall(r"^\|.*\n(?:\|.*\n)*", text, re.MULTILINE):
        rows = [line.split("|") for line in table.splitlines()]
        left_out = {index for index, head in enumerate(rows[0]) if head in MEASURED}
        found.append(["|".join(cell for index, cell in enumerate(row) if index not in left_out) for row in rows])
    return found
