"""Protects the plan: its parts add up, its ranking is right, and its command says so. test_plan_of_engines.py compares it with engines."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lime_dist import load_config
from lime_dist.config.deepspeed import batch_split
from lime_dist.config.load import make_config
from lime_dist.config.schema import HISTORY_KEYS, Checkpointing
from lime_dist.errors import LimeError
from lime_dist.model import cost, memory_traffic
from lime_dist.model.crossing import Prices
from lime_dist.pipeline import flat_layout
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.schedules.base import make_schedule
from lime_dist.pipeline.shared_weights import shared_parameters
from lime_dist.plan import __main__ as plan
from lime_dist.plan import text
from lime_dist.plan.forecast import Machine, as_baseline, forecast, machine_times
from lime_dist.plan.simulate import Link, simulate
from lime_dist.plan.stage_times import boundary_bytes, stage_times
from lime_dist.plan.sweep import sweep, with_parts

ROOT = Path(__file__).resolve().parents[1]
FAST_LINKS = Machine(flops=1e12, memory_bandwidth=1e18, bandwidth=1e12, latency=0.0)

# -- the numbers ----------------------------------------------------------------------------------------------------------

SIZE = [
    "model.hidden_size=64", "model.intermediate_size=256", "model.num_hidden_layers=16", "model.vocab_size=64",
    "model.num_attention_heads=4", "data.sequence_length=128", "train.micro_batch_size=1", "train.global_batch_size=32",
    "parallel.pipeline_stages=4",
]  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "overrides", "changes", "processes"),
    [
        ("computation", [], {}, 4),
        ("link", [], {"bandwidth": 1e8}, 4),
        ("latency", [], {"latency": 0.01}, 4),
        ("bubble", ["train.global_batch_size=2"], {}, 4),
        ("imbalance", ["model.vocab_size=20000"], {}, 4),
        ("reduction", ["parallel.pipeline_stages=1"], {"bandwidth": 1e9}, 32),
    ],
)
def test_what_limits_a_step(limit: str, overrides: list[str], changes: dict[str, float], processes: int) -> None:
    machine = Machine(**{**vars(FAST_LINKS), **changes})
    planned = forecast(load_config(None, [*SIZE, *overrides]), machine, processes)
    assert planned.limit == limit
    assert sum(vars(planned.parts).values()) == planned.seconds and min(vars(planned.parts).values()) >= 0
    assert planned.bubble == pytest.approx(1 - planned.parts.computation / planned.seconds)


TWO_PARTS = ["parallel.virtual_stages=2", "pipeline.schedule=interleaved"]
PLANS = [
    [],
    ["--stages", "4", "--processes", "8", "--bandwidth", "200MB"],
    ["--stages", "4", "--processes", "8", "--bandwidth", "2MB", "train.micro_batch_size=2"],
    ["--stages", "4", "train.global_batch_size=2", "--latency", "1ms"],
    ["parallel.pipeline_stages=4", "train.global_batch_size=4", "train.micro_batch_size=2"],
    ["--stages", "1", "--processes", "8", "--bandwidth", "1GB", "parallel.zero_stage=1"],
    ["pipeline.engine=stock", "--bandwidth", "50MB"],
    ["--stages", "4", "pipeline.schedule=zero_bubble", "--bandwidth", "1GB"],
    ["--stages", "4", *TWO_PARTS, "--bandwidth", "1GB"],
]


@pytest.mark.parametrize("arguments", PLANS, ids=" ".join)
def test_the_numbers_of_a_plan_agree_with_each_other_and_with_its_timeline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    """The parts add up to the step, idle is all but computation, the verdict is the largest part, the picture ends with the step."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    machine = ["--flops", "40G", "--efficiency", "1", *arguments]
    table = call(monkeypatch, capsys, *QUICKSTART, *machine, "--timeline", str(tmp_path / "step.png"))
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    shares = {name: float(share) for name, share in re.findall(r"(\w+) ([\d.]+) %", lines["step"])}
    idle = float(re.findall(r"([\d.]+) %", lines["idle"])[0])
    assert sum(shares.values()) == pytest.approx(100, abs=0.4)
    assert idle == pytest.approx(100 - shares["computation"], abs=0.11)
    verdict, share = re.findall(r"^limit +(\w+), ([\d.]+) %", lines["limit"])[0]
    assert float(share) == shares[verdict] == max(shares.values())
    second = re.findall(r"then (\w+), ([\d.]+) %", table)
    assert bool(second) == (shares[verdict] < 50)
    if second:
        assert float(second[0][1]) == shares[second[0][0]] == sorted(shares.values())[-2]

    (axes,) = figures[0].axes
    step = re.findall(r"^step +([\d.,]+ \w+) predicted", lines["step"])[0]
    assert axes.get_title().endswith(f", {step}; idle: {idle} %")
    values = json.loads(call(monkeypatch, capsys, *QUICKSTART, *machine, "--json"))
    scale = {"s": 1.0, "ms": 1e3}[axes.get_xlabel().split()[0]]
    ends = [path.get_extents().xmax for bars in axes.collections for path in bars.get_paths()]
    assert max(ends) == pytest.approx(scale * values["seconds_per_step"]) == pytest.approx(axes.get_xlim()[1])


def test_the_whole_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens and hours by hand, without and with a batch ramp."""
    values = json.loads(call(monkeypatch, capsys, *QUICKSTART, "--json", "train.steps=1000"))
    assert values["total_tokens"] == 1000 * 8 * 256
    assert values["total_hours"] == pytest.approx(1000 * values["seconds_per_step"] / 3600)
    assert "run       1,000 steps: 2.05 M tokens, " in call(monkeypatch, capsys, *QUICKSTART, "train.steps=1000")
    ramp = (
        "train.batch_ramp={start: 4, increment: 2, samples: 40}"  # 4 samples for 5 steps, 6 for 4 (44 samples), then 8
    )
    ramped = json.loads(call(monkeypatch, capsys, *QUICKSTART, "--json", "train.steps=10", ramp))
    half = json.loads(call(monkeypatch, capsys, *QUICKSTART, "--json", "train.global_batch_size=4"))
    seconds = [
        half["seconds_per_step"],
        (half["seconds_per_step"] + ramped["seconds_per_step"]) / 2,
        ramped["seconds_per_step"],
    ]
    assert ramped["total_tokens"] == (5 * 4 + 4 * 6 + 8) * 256
    assert ramped["total_hours"] == pytest.approx((5 * seconds[0] + 4 * seconds[1] + seconds[2]) / 3600)


@pytest.mark.parametrize("engine", ["overlap", "stock"])
@pytest.mark.parametrize("bandwidth", [1e7, 1e9, 1e12])
def test_a_step_takes_the_simulated_seconds(engine: str, bandwidth: float) -> None:
    """And its bubble is the simulated one, on average over stages."""
    no_shared_weights = ["model.tie_word_embeddings=false", "pipeline.boundary=entries"]
    config = load_config(None, [*SIZE, f"pipeline.engine={engine}", *no_shared_weights])
    planned = forecast(config, Machine(1e12, 1e18, bandwidth, 1e-5), 4)
    trace = simulate(
        stage_times(config, 1e12), boundary_bytes(config), Link(bandwidth, 1e-5), make_schedule(config, 32)
    )
    assert planned.seconds == pytest.approx(trace.seconds)
    assert planned.bubble == pytest.approx(sum(trace.bubble) / 4)


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_passes_take_products_and_memory_traffic(checkpointing: Checkpointing) -> None:
    """Without a history: activations that autograd keeps move twice in forward and four times in backward; the head's, on the last
    stage."""
    overrides = ["model.architecture=llama", f"parallel.activation_checkpointing={str(checkpointing).lower()}"]
    config = load_config(None, [*SIZE, *overrides, "parallel.stage_layers=[1,2,3,10]"])
    bounds, tokens = [0, 1, 3, 6, 16], 128
    flops = stage_times(config, 1.0, bounds)
    times = machine_times(config, Machine(1e9, 1e6, 1.0, 0.0), bounds, flops)
    layer, head = (
        cost.activation_bytes(config.model, 0, tokens, 4, False),
        cost.head_activation_bytes(config.model, tokens, 4),
    )
    for stage, each in enumerate(times):
        layers, last = bounds[stage + 1] - bounds[stage], stage == 3
        forward, backward = 2 * (layers * layer + last * head), 4 * (layers * layer + last * head)
        again = {False: 0, True: layer, "selective": cost.feed_forward_activation_bytes(config.model, tokens, 4)}
        backward += 2 * layers * again[checkpointing]
        assert each.forward == pytest.approx(flops[stage].forward / 1e9 + forward / 1e6)
        assert each.backward == pytest.approx(flops[stage].backward / 1e9 + backward / 1e6)


def test_a_history_moves_memory() -> None:
    """Reads are in blocks: a layer of a full history moves more than one of first_last, and less than with a read per entry."""
    layers, prices = [range(8, 16)], Prices(1, 1)
    moved = {
        name: memory_traffic.stage_traffic(
            load_config(None, [*SIZE, f"model.lime.history={{policy: {name}}}"]).model, layers, 128, 4, prices
        )
        for name in ("first_last", "full")
    }
    llama_model = load_config(None, [*SIZE, "model.architecture=llama"]).model
    llama = memory_traffic.stage_traffic(llama_model, layers, 128, 4, prices)
    entry, mixed_keys = 2 * 64 * 128 * 4, 8 * 64 * 128 * 4  # mixed keys are kept, and move twice
    extra = {name: (forward - llama[0] - 2 * mixed_keys) / entry / 8 for name, (forward, _) in moved.items()}
    assert 2 + 4 + 1 < extra["first_last"] < extra["full"] < 2 + 12 + 1, (
        "write the slot; read entries; write the mixture"
    )
    backward = moved["first_last"][1] - llama[1] - 4 * mixed_keys
    assert backward == pytest.approx(2 * entry * 8 * extra["first_last"])


def test_mixing_takes_the_time_of_the_stage_that_does_it() -> None:
    """With `minimal` the third of four stages mixes for the last one: its passes take longer, those of the last one less."""
    machine, bounds = Machine(1e12, 1e12, 1.0, 0.0), [0, 4, 8, 12, 16]
    times = {}
    for form in ("minimal", "entries"):
        config = load_config(None, [*SIZE, "model.lime.history={policy: full}", f"pipeline.boundary={form}"])
        times[form] = machine_times(config, machine, bounds, stage_times(config, 1.0, bounds))
    for minimal, entries, sign in zip(times["minimal"], times["entries"], (0, 0, 1, -1), strict=True):
        assert sign * minimal.forward >= sign * entries.forward and sign * minimal.backward >= sign * entries.backward
        assert (minimal == entries) == (sign == 0)


def test_the_parts_of_a_step() -> None:
    """A part is what a step would gain: without the link's part it takes as long as with links that take no time."""
    config = load_config(None, [*SIZE, "pipeline.extra_in_flight=0"])
    slow, ideal = (forecast(config, Machine(1e12, 1e18, bandwidth, 0.0), 4) for bandwidth in (5e9, 1e18))
    assert slow.limit == "computation" and slow.parts.link > 0.05 * slow.seconds
    assert slow.seconds - slow.parts.link - slow.parts.reduction == pytest.approx(
        ideal.seconds - ideal.parts.reduction - ideal.parts.link
    )


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize(
    ("schedule", "bandwidth"), [("1f1b", 1e12), ("1f1b", 1e9), ("zero_bubble", 1e9), ("stock", 1e9)]
)
def test_the_last_pass_hides_sums_over_replicas(
    monkeypatch: pytest.MonkeyPatch, zero_stage: int, schedule: str, bandwidth: float
) -> None:
    """By hand, for some ten even pieces: over a fast link the first piece is left, over a slow one all that the last pass did not
    hide. What is gathered afterwards (ZeRO 1) is not hidden."""
    monkeypatch.setattr(flat_layout, "PIECE_ELEMENTS", 100_000)
    setting = ["parallel.pipeline_stages=1", "precision=bf16", f"parallel.zero_stage={zero_stage}"]
    config = load_config(None, [*SIZE, *setting, f"pipeline.schedule={schedule}"])
    planned = forecast(config, Machine(1e12, 1e18, bandwidth, 0.0), 4)
    exchange, backward = planned.stages[0].exchange, planned.stages[0].backward_flops / 1e12
    late = exchange.late_bytes / exchange.gradient_bytes
    assert 1 / 15 < late < 1 / 8
    sums = (2 - zero_stage) * 3 / 4 * exchange.gradient_bytes / bandwidth
    gathering = 3 / 4 * exchange.weight_bytes / bandwidth
    if bandwidth == 1e12:
        assert sums < backward / 10
        left = late * sums
    else:
        assert sums > 2 * backward
        hidden = {"1f1b": backward, "zero_bubble": stage_times(config, 1e12)[0].weights, "stock": 0.0}[schedule]
        left = sums - (1 - late) * hidden
    assert planned.parts.reduction == pytest.approx(left + gathering)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_histories_that_wait_on_the_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], schedule: str
) -> None:
    """By hand: three histories stay on each stage, of those that it has in flight; a received hidden state goes with its history. While
    a forward pass runs there is a fourth history, and no backward pass. (tests/cuda/test_memory.py measures the peaks.)"""
    config = load_config(None, [*SIZE, f"pipeline.schedule={schedule}", "pipeline.extra_in_flight=1", "precision=bf16"])
    parallel = config.parallel.model_copy(update={"offload_history": True})
    stages, moved = (
        [stage.memory for stage in forecast(each, FAST_LINKS, 4).stages]
        for each in (config, config.model_copy(update={"parallel": parallel}))
    )
    tokens = config.train.micro_batch_size * config.data.sequence_length
    assert [stage.in_flight for stage in stages] == [7, 5, 3, 1]
    for number, (memory, saving) in enumerate(zip(stages, moved, strict=True)):
        waiting, history = max(0, memory.in_flight - 3), memory.history // memory.in_flight
        state = 2 * tokens * config.model.hidden_size if number else 0
        working = max(memory.working, history + state) if waiting else memory.working
        assert saving.working == working
        assert memory.peak - saving.peak == waiting * (history + state) - (working - memory.working)
        buffers = (memory.in_flight - 1) * bool(waiting)  # all in flight but the next to be in backward
        assert saving.host == buffers * 2 ** math.ceil(math.log2(history + state))
        assert saving.history == (memory.in_flight - waiting) * history
    line = (
        f"and up to {text.show(max(each.host for each in moved), 'B')} of host memory a process, where histories wait"
    )
    arguments = ["--config", "configs/quickstart.yaml", *SIZE, f"pipeline.schedule={schedule}", "precision=bf16"]
    assert line in call(monkeypatch, capsys, *arguments, "parallel.offload_history=true")
    assert "host memory" not in call(monkeypatch, capsys, *arguments)


def test_gradients_are_reduced_over_replicas_and_tied_stages() -> None:
    """By hand: in a ring of 4 each sends 3/4 of the gradients twice; with ZeRO 1 it sends weights in bf16 the second time."""
    one_stage = ["parallel.pipeline_stages=1", "precision=bf16"]
    machine = Machine(1e12, 1e18, 1e9, 0.0)
    for zero, size in ((0, 4 + 4), (1, 4 + 2)):
        planned = forecast(load_config(None, [*SIZE, *one_stage, f"parallel.zero_stage={zero}"]), machine, 4)
        ((exchange, memory),) = ((stage.exchange, stage.memory) for stage in planned.stages)
        elements = memory.weights // 2  # with padding
        assert planned.parameters < elements < 1.02 * planned.parameters
        assert planned.parts.reduction == pytest.approx(3 / 4 * size * elements / 1e9)
        assert (exchange.calls, exchange.gradient_bytes, exchange.weight_bytes) == (
            1 + zero,
            4 * elements,
            2 * zero * elements,
        )
        assert exchange.late_bytes == exchange.gradient_bytes, "one piece"
    entries, untied = "pipeline.boundary=entries", "model.tie_word_embeddings=false"
    tied = forecast(load_config(None, [*SIZE, entries]), machine, 4)
    assert tied.parts.reduction == pytest.approx(64 * 64 * 4 / 1e9)
    assert forecast(load_config(None, [*SIZE, entries, untied]), machine, 4).parts.reduction == 0
    config = load_config(None, [*SIZE, untied])
    shared = sum(shared_parameters(config, stage_bounds(config)).values())
    assert shared > 0
    planned = forecast(config, Machine(1e12, 1e18, 1e9, 1e-6), 4)
    assert planned.parts.reduction == pytest.approx(2 * 3 / 4 * shared * 4 / 1e9 + 2 * 3 * 1e-6)


# -- the sweep ------------------------------------------------------------------------------------------------------------


def test_a_sweep_ranks_the_fitting_candidates() -> None:
    config = load_config(None, [*SIZE, "parallel.stage_layers=[1,5,5,5]"])
    everything = sweep(config, Machine(1e12, 1e12, 1e9, 1e-5), 8)
    tried = {(c.stages, c.micro_batch_size, c.policy["policy"]) for c in everything.fitting}
    sizes = {1: (1, 2, 4), 2: (1, 2, 4, 8), 4: (1, 2, 4, 8, 16), 8: (1, 2, 4, 8, 16, 32)}
    assert tried == {(p, m, name) for p, fitting in sizes.items() for m in fitting for name in HISTORY_KEYS}
    seconds = [c.forecast.seconds for c in everything.fitting]
    assert seconds == sorted(seconds) and not everything.too_large
    for candidate in everything.fitting:
        by_hand = candidate.config.parallel.stage_layers
        assert by_hand == ([1, 5, 5, 5] if candidate.stages == 4 else None)
        again = forecast(make_config(candidate.config.model_dump(), "a test"), Machine(1e12, 1e12, 1e9, 1e-5), 8)
        assert again == candidate.forecast

    by_stage = load_config(None, [*SIZE, "parallel.activation_checkpointing=[true,selective,false,false]"])
    others = sweep(by_stage, Machine(1e12, 1e12, 1e9, 1e-5), 8).fitting
    for candidate in others:
        is_other = "parallel.activation_checkpointing=auto" in candidate.overrides(by_stage)
        assert is_other == (candidate.stages != 4)
    limit = sorted(c.forecast.peak_memory for c in everything.fitting)[20]
    bounded = sweep(config, Machine(1e12, 1e12, 1e9, 1e-5, limit), 8)
    assert bounded.fitting == [c for c in everything.fitting if c.forecast.peak_memory <= limit]
    assert len(bounded.fitting) + len(bounded.too_large) == len(tried)
    assert bounded.too_large[0].forecast.peak_memory == min(c.forecast.peak_memory for c in bounded.too_large) > limit


def test_the_best_of_a_sweep_has_no_ties() -> None:
    """On one stage the micro-batch size changes nothing: only the largest is shown. On several stages smaller ones are faster."""
    result = sweep(load_config(None, [*SIZE, "model.architecture=llama"]), Machine(1e12, 1e12, 1e12, 0.0), 8)
    best = result.best(100)
    assert [c.micro_batch_size for c in best if c.stages == 1] == [4]
    assert [c.micro_batch_size for c in best if c.stages == 4] == [1, 2, 4, 8, 16]
    assert [c.forecast.seconds for c in best] == pytest.approx(sorted(c.forecast.seconds for c in best), rel=0.01)
    assert result.best(3) == best[:3]


def test_the_fastest_of_a_sweep_are_tried_with_several_parts() -> None:
    """Few micro-batches on fast links: the bubble decides, and more parts are faster. The overrides make the configuration."""
    config = load_config(None, [*SIZE, "model.architecture=llama", "train.global_batch_size=8"])
    machine = Machine(1e12, 1e18, 1e15, 0.0)
    usual = sweep(config, machine, 4)
    result = with_parts(usual, machine, 4, 5)
    assert {candidate.parts for candidate in result.fitting + result.too_large} == {1, 2, 4}
    four = {c.parts: c for c in result.fitting + result.too_large if (c.stages, c.micro_batch_size) == (4, 1)}
    assert four[4].forecast.seconds < four[2].forecast.seconds < four[1].forecast.seconds
    again = load_config(
        None, [*SIZE, "model.architecture=llama", "train.global_batch_size=8", *four[4].overrides(config)]
    )
    assert again == four[4].config


def test_a_sweep_keeps_the_configured_policy_and_models_without_one() -> None:
    own = {"policy": "chunked", "first": 0, "chunk_size": 4, "rank": 2}
    lime = sweep(load_config(None, [*SIZE, f"model.lime.history={json.dumps(own)}"]), FAST_LINKS, 1)
    assert [c.policy for c in lime.fitting].count(own) == 6 and len(lime.fitting) == 6 * 5
    llama = sweep(load_config(None, [*SIZE, "model.architecture=llama"]), FAST_LINKS, 1)
    assert {c.policy for c in llama.fitting} == {None}


def test_a_sweep_in_which_nothing_divides_names_every_batch_size() -> None:
    config = load_config(None, [*SIZE, "train.batch_ramp={start: 8, increment: 4, samples: 64}"])
    with pytest.raises(LimeError) as caught:
        sweep(config, FAST_LINKS, 31)
    for key in ("train.global_batch_size=", "train.batch_ramp.start=8", "train.batch_ramp.increment=4"):
        assert key in str(caught.value)


def test_the_overrides_of_a_sweep_make_its_configurations_and_those_can_run() -> None:
    """Also where stages were cut by hand, validation samples were given, or the batch grows."""
    given = [
        "parallel.stage_layers=[1,5,5,5]",
        "train.evaluation_samples=24",
        "train.batch_ramp={start: 8, increment: 8, samples: 64}",
    ]
    config = load_config(None, [*SIZE, *given])
    tried = sweep(config, FAST_LINKS, 8).fitting
    assert {candidate.stages for candidate in tried} == {1, 2, 4, 8}
    for candidate in tried:
        again = load_config(None, [*SIZE, *given, *candidate.overrides(config)])
        assert again == candidate.config
        width, _ = batch_split(again, 8)
        assert again.train.evaluation_samples
        assert again.train.evaluation_samples % (width * again.train.micro_batch_size) == 0


def test_indivisible_processes() -> None:
    with pytest.raises(LimeError, match=r"--processes 17: .*global_batch_size=32"):
        sweep(load_config(None, SIZE), FAST_LINKS, 17)


# -- the command ----------------------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The output of the command."""
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()
    return capsys.readouterr().out


QUICKSTART = ("--config", str(ROOT / "configs/quickstart.yaml"))


def test_json_and_table_have_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (*QUICKSTART, "--stages", "4", "--processes", "8", "--gpu-memory", "50MB", "parallel.zero_stage=1")
    values = json.loads(call(monkeypatch, capsys, *arguments, "--json"))
    table = call(monkeypatch, capsys, *arguments)
    config = load_config(QUICKSTART[1], ["parallel.pipeline_stages=4", "parallel.zero_stage=1"])
    assert text.plan_table(config, values) == table.rstrip("\n")
    assert f"{values['parameters']:,} parameters; 4 stage(s) × 2 replica(s); 4 micro-batches" in table
    rows = [line.split("  ") for line in table.splitlines() if re.match(r" +\d", line)]
    assert len(rows) == len(values["stages"]) == 4
    for row, stage in zip(rows, values["stages"], strict=True):
        cells = [cell.strip() for cell in row if cell.strip()]
        assert cells == [cell for cell in text.stage_row(stage) if cell]
        assert cells[2] == f"{stage['parameters']:,}"
        memory = stage["memory"]
        assert memory["peak"] == sum(memory[name] for name in memory if name not in ("peak", "in_flight"))
    assert values["peak_memory"] == max(stage["memory"]["peak"] for stage in values["stages"])
    assert values["fits"] is (values["peak_memory"] <= 50e6) and "DOES NOT FIT" in table
    assert values["over_llama"]["flops"] > 1 and values["over_llama"]["memory"] > 1


def test_with_auto_llama_chooses_and_cuts_for_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["parallel.pipeline_stages=4", "parallel.activation_checkpointing=auto"]
    values = json.loads(call(monkeypatch, capsys, *QUICKSTART, "--gpu-memory", "40MB", "--json", *overrides))
    assert values["checkpointing_choice"].endswith(
        "true on stages 0 to 2, false on stage 3, for 85% of 0.040 GB a process"
    )
    llama = forecast(as_baseline(load_config(QUICKSTART[1], overrides)), Machine(**values["machine"]), 4)
    assert values["over_llama"]["memory"] == values["peak_memory"] / llama.peak_memory


def test_the_command_sweeps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*QUICKSTART, "--processes", "4", "--sweep", "--gpu-memory", "120MB")
    values = json.loads(call(monkeypatch, capsys, *arguments, "--json"))
    table = call(monkeypatch, capsys, *arguments)
    assert f"{values['tried']} settings tried, {values['fitting']} fit in 120 MB" in table
    assert len(values["best"]) == 5 and all(row["peak_memory"] <= 120e6 for row in values["best"])
    for row in values["best"]:
        assert text.reason(row) in table and text.history(row["history"]) in table
    pasted = [shlex.split(line[3:]) for line in table.splitlines() if re.match(r"\d  parallel", line)]
    assert pasted == [row["overrides"] for row in values["best"]]
    for row in values["best"]:
        again = json.loads(call(monkeypatch, capsys, *QUICKSTART, "--processes", "4", "--json", *row["overrides"]))
        assert again["seconds_per_step"] == row["seconds_per_step"] and again["peak_memory"] == row["peak_memory"]
    table = call(monkeypatch, capsys, *QUICKSTART, "--sweep", "--gpu-memory", "1MB")
    assert ", 0 fit in 1.00 MB" in table and "needs the least memory" in table


def test_it_is_quick_and_light() -> None:
    """128 layers on 64 stages take about a second (0.4 s measured), with Python's own start; no torch, no DeepSpeed."""
    code = (
        "import resource, sys; from lime_dist.plan import __main__ as plan; plan.main(); used = resource.getrusage(resource.RUSAGE_SELF); "
        "peak = open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]; "
        "print(used.ru_utime + used.ru_stime, peak, 'torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--config", "configs/deep/lime_128.yaml", "--stages", "64"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, kilobytes, *imported = finished.stdout.splitlines()[-1].split()
    assert imported == ["False", "False"]
    assert float(seconds) < 2 and int(kilobytes) < 200_000


def test_a_timeline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "timeline.png"
    assert str(picture) in call(monkeypatch, capsys, *QUICKSTART, "--timeline", str(picture))
    pixels = matplotlib.imread(picture)
    forward, backward = (0x44, 0x77, 0xAA), (0x66, 0xAA, 0x77)
    for colour in (forward, backward):
        assert ((pixels[..., :3] * 255).round() == colour).all(-1).mean() > 0.01


def test_a_timeline_says_which_part_a_pass_is_through(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Forward passes through the second of two parts, and those through the first one, in colours of their own, as often as they are."""
    pyplot, colors = pytest.importorskip("matplotlib.pyplot"), pytest.importorskip("matplotlib.colors")
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    table = call(monkeypatch, capsys, *QUICKSTART, *TWO_PARTS, "--timeline", str(tmp_path / "step.png"))
    assert "; with equal parts and free transfers, (P − 1)/(V·m + P − 1) = 5.9 %" in table
    (axes,) = figures[0].axes
    assert axes.get_title().startswith("2 stages of 2 parts (later ones lighter), 8 micro-batches, ")
    drawn = Counter(colors.to_hex(colour) for bars in axes.collections for colour in bars.get_facecolors())
    assert drawn["#4477aa"] == drawn["#8fadcc"] == drawn["#66aa77"] == drawn["#a3ccad"] == 2 * 8


def test_a_timeline_needs_matplotlib_and_a_writable_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(LimeError, match="cannot be written"):
        call(monkeypatch, capsys, *QUICKSTART, "--timeline", "/nowhere/at/all.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LimeError, match=r"--timeline needs matplotlib: pip install .*\[analysis\]"):
        call(monkeypatch, capsys, *QUICKSTART, "--timeline", "timeline.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "99"], r"parallel.pipeline_stages=99 is more than model.num_hidden_layers=16"),
        (["--processes", "3"], r"parallel.pipeline_stages=2 does not divide the 3 processes"),
        (["--processes", "0"], r"--processes 0 must be at least 1"),
        (["--processes", "64"], r"train.global_batch_size=8 is not micro-batch"),
        (["--stages", "4", "parallel.pipeline_stages=2"], r"--stages 4 and parallel.pipeline_stages=… say the same"),
        (["--sweep", "--timeline", "x.png"], r"leave out --sweep"),
        (["model.layers=3"], r"unknown key model.layers=3"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(LimeError, match=message):
        call(monkeypatch, capsys, *QUICKSTART, *arguments)


def test_a_mistake_is_one_line() -> None:
    command = [sys.executable, "-m", "lime_dist.plan", "--config", "nowhere.yaml"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    (line,) = finished.stderr.splitlines()
    assert finished.returncode == 2 and line.startswith("error: cannot read the configuration nowhere.yaml")
