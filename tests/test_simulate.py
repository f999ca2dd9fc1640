"""Protects the simulated step: numbers computed by hand, laws that hold for any times, and bounds that nothing beats."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from lime_dist import load_config
from lime_dist.config.schema import Checkpointing
from lime_dist.model.architecture import architecture_of
from lime_dist.model.cost import head_flops, layer_flops
from lime_dist.pipeline.schedules.base import Instruction, Schedule, make_schedule
from lime_dist.pipeline.schedules.one_forward_one_backward import OneForwardOneBackward
from lime_dist.pipeline.schedules.stock import StockSchedule
from lime_dist.pipeline.schedules.zero_bubble import ZeroBubble
from lime_dist.plan import simulate as simulator
from lime_dist.plan.lower_bound import lower_bound
from lime_dist.plan.simulate import Interval, Link, StageTimes, StepTrace
from lime_dist.plan.stage_times import boundary_bytes, stage_times

Setting = tuple[list[StageTimes], list[int], list[Link], int]
NO_TIME = Link(math.inf)
CLOSE = 1e-9  # seconds, for sums of floats in another order


def one_schedule(name: str, micro_batches: int, stages: int, extra: int) -> Schedule:
    if name == StockSchedule.name:
        return StockSchedule(micro_batches, stages)
    if name == ZeroBubble.name:
        return ZeroBubble(micro_batches, stages, extra, (None, 0, 1, None)[extra])
    return OneForwardOneBackward(micro_batches, stages, extra)


def simulate(
    times: list[StageTimes],
    payloads: list[int],
    links: list[Link] | Link,
    micro_batches: int,
    *,
    extra: int = 0,
    schedule: str = "1f1b",
    **options: Any,
) -> StepTrace:
    chosen = one_schedule(schedule, micro_batches, len(times), extra)
    return simulator.simulate(times, payloads, links, chosen, **options)


def random_setting(generator: random.Random) -> Setting:
    """Uneven stages and links, sometimes passes and transfers that take no time, often fewer micro-batches than stages. Some or all of
    a backward pass can be a weight pass."""
    stages, micro_batches = generator.randint(1, 6), generator.randint(1, 12)
    most = generator.choice([0, 3, 12])
    backwards = [generator.randint(0, 8) for _ in range(stages)]
    times = [StageTimes(generator.randint(0, 8), backward, generator.randint(0, backward)) for backward in backwards]
    payloads = [generator.randint(0, most) for _ in range(stages - 1)]
    links = [Link(generator.choice([1, 2, 3]), generator.choice([0, 0, 2])) for _ in range(stages - 1)]
    return times, payloads, links, micro_batches


def settings(seed: int, count: int) -> Iterator[tuple[random.Random, Setting, int, str]]:
    """Random settings, each with a number of extra micro-batches and a schedule."""
    generator = random.Random(seed)
    for _ in range(count):
        schedule = generator.choice(["1f1b", "stock", "zero_bubble"])
        yield generator, random_setting(generator), generator.randint(0, 3), schedule


def passes(trace: StepTrace, stage: int) -> list[tuple[str, int]]:
    return [(x.instruction, x.micro_batch) for x in trace.intervals[stage] if x.instruction.endswith("Pass")]


# -- by hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "stock"])
def test_one_stage_computes_all_the_time(schedule: str) -> None:
    trace = simulate([StageTimes(1, 2)], [], NO_TIME, 4, schedule=schedule, update=5)
    assert trace.seconds == 4 * 3 + 5
    assert (trace.busy, trace.waiting, trace.bubble) == ([17], [0], [0])
    assert [each[:4] for each in trace.intervals[0][1:3]] == [("BackwardPass", 0, 1, 3), ("ForwardPass", 1, 3, 4)]
    assert trace.intervals[0][-1] == Interval("OptimizerStep", 0, 12, 17)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_equal_stages_without_transfers_fill_and_drain_once(stages: int, micro_batches: int) -> None:
    """The textbook's (M + P − 1)·(f + b), a bubble of (P − 1) / (M + P − 1); also with M < P."""
    times = [StageTimes(1, 2)] * stages
    trace = simulate(times, [7] * (stages - 1), NO_TIME, micro_batches)
    assert trace.seconds == (micro_batches + stages - 1) * 3
    assert trace.bubble == pytest.approx([(stages - 1) / (micro_batches + stages - 1)] * stages)
    assert lower_bound(times, [7] * (stages - 1), NO_TIME, micro_batches) == trace.seconds


# Two stages, f = b = 1, a transfer takes 2. In all cases stage 1 gets payload 0 at 3, its gradient is back at 3+2+2 = 7.
#  extra 0, two in flight. Payloads at 3 and 5, gradient 0 at 7; stage 0: B0 7–8, F2 8–9, and only now the receive of gradient 1: it
#    is there at 11, B1 11–12, F3 12–13. Payload 2 is there at 11, stage 1 has done it at 13, gradient 2 is there at 15: the same
#    again every 4. M = 6: B1 ends at 12, B5 at 12 + 4·4 = 28.
#  extra 1, three in flight: payloads at 3, 5, 7, gradients at 7, 9, 11; F3 is 8–9, payload 3 at 11: the same again 8 later.
#    M = 6: B2 ends at 12, B5 at 20.
#  extra 2, four in flight: F4 is 8–9, payload 4 at 11, just when stage 1 has done 3; payload m at 3+2m, gradient m at 7+2m, no
#    waits. M = 6: B5 ends at 7 + 2·5 + 1 = 18. (A receive posted only when it is needed would make payload 1 start at 5.)
#  stock: F0 0–1, transfer 1–3, stage 1 F0 3–4, B0 4–5, gradient 5–7, only then payload 1, which stage 0 holds back: 7–9, B0 9–10
#    beside F1; then B1 10–11, gradient 11–13: 6 a micro-batch. M = 1: B0 is 7–8. The last one's gradient comes without a
#    payload after it, so 8 + 6·(M − 1): 38.
@pytest.mark.parametrize(
    ("schedule", "extra", "seconds"), [("1f1b", 0, 28), ("1f1b", 1, 20), ("1f1b", 2, 18), ("stock", 0, 38)]
)
def test_transfers_as_long_as_both_passes(schedule: str, extra: int, seconds: float) -> None:
    trace = simulate([StageTimes(1, 1)] * 2, [20], Link(10), 6, extra=extra, schedule=schedule)
    assert trace.seconds == seconds
    assert trace.busy == [12, 12]
    assert [each[:4] for each in trace.intervals[1][:2]] == [("RecvActivation", 0, 0, 3), ("ForwardPass", 0, 3, 4)]
    sent = next(x for x in trace.intervals[0] if x.instruction == "SendActivation")
    assert (sent.begin, sent.end) == (1, 3 if schedule == "stock" else 1)


def test_latency_delays_but_does_not_occupy() -> None:
    """Duration 1, latency 10. Payloads 0 and 1 are there at 12 and 13 (a link that latency occupies would bring the second at
    23). The receive of payload 2 is posted when stage 1 turns to payload 1, after F0 12–13 and B0 13–14: its transfer starts then,
    and is there at 25. Its gradient leaves at 27, is there at 38, and the last backward pass ends at 39."""
    trace = simulate([StageTimes(1, 1)] * 2, [10], Link(10, 10), 3, extra=1)
    assert [x.begin for x in trace.intervals[1] if x.instruction == "ForwardPass"] == [12, 14, 25]
    assert trace.seconds == 39


def test_a_slow_link_sets_the_pace() -> None:
    """M·bytes / bandwidth, and what the first and the last micro-batch cannot avoid: passes 4, transfers 10 + 10."""
    for micro_batches in (10, 100):
        trace = simulate([StageTimes(1, 1)] * 2, [10], Link(1), micro_batches, extra=1)
        assert trace.seconds == 4 + 20 + (micro_batches - 1) * 10


def test_more_in_flight_can_cost() -> None:
    """Times (f, b) = (0, 1), (1, 0), (0, 0), M = 3. extra 0: stage 1 sends gradient 0 after two forward passes, at 2, the others at
    3; stage 0's backward passes 2–5. extra 1: stage 1 makes all three forward passes first, stage 0's backward passes 3–6."""
    times = [StageTimes(0, 1), StageTimes(1, 0), StageTimes(0, 0)]
    assert simulate(times, [0, 0], NO_TIME, 3, extra=0).seconds == 5
    assert simulate(times, [0, 0], NO_TIME, 3, extra=1).seconds == 6


# -- for any times --------------------------------------------------------------------------------------------------------


def test_time_adds_up() -> None:
    """Intervals follow each other without gaps; computing, waiting and idling add up to the step."""
    for _, (times, payloads, links, micro_batches), extra, schedule in settings(0, 150):
        trace = simulate(times, payloads, links, micro_batches, extra=extra, schedule=schedule, update=3)
        for stage, own in enumerate(trace.intervals):
            assert own[0].begin == 0 and all(a.end == b.begin and a.begin <= a.end for a, b in pairwise(own))
            idle = trace.seconds - own[-1].end
            assert idle >= 0
            assert trace.busy[stage] + trace.waiting[stage] + idle == pytest.approx(trace.seconds, abs=CLOSE)
            work = micro_batches * (times[stage].forward + times[stage].backward) + 3
            assert trace.busy[stage] == pytest.approx(work, abs=CLOSE)
            assert trace.bubble[stage] == pytest.approx(1 - work / trace.seconds)


def test_every_micro_batch_goes_there_and_back() -> None:
    """Once through every pass, each with its duration, and never before the transfer that it needs can have arrived."""
    for _, (times, payloads, links, micro_batches), extra, schedule in settings(1, 150):
        trace = simulate(times, payloads, links, micro_batches, extra=extra, schedule=schedule)
        places = {(s, x.instruction, x.micro_batch): x for s, own in enumerate(trace.intervals) for x in own}
        assert len(places) == sum(map(len, trace.intervals))
        for micro_batch in range(micro_batches):
            way = [places[s, "ForwardPass", micro_batch] for s in range(len(times))]
            splits = schedule == ZeroBubble.name
            kind = "BackwardInput" if splits else "BackwardPass"
            way += [places[s, kind, micro_batch] for s in reversed(range(len(times)))]
            lengths = [each.forward for each in times]
            lengths += [each.backward - splits * each.weights for each in reversed(times)]
            for stage, each in enumerate(times if splits else []):
                weights = places[stage, "BackwardWeight", micro_batch]
                assert weights.end - weights.begin == pytest.approx(each.weights, abs=CLOSE)
                assert weights.begin >= places[stage, kind, micro_batch].end - CLOSE
            assert [x.end - x.begin for x in way] == pytest.approx(lengths, abs=CLOSE)
            crossings = [size / link.bandwidth + link.latency for size, link in zip(payloads, links, strict=True)]
            for (a, b), gap in zip(pairwise(way), [*crossings, 0, *reversed(crossings)], strict=True):
                assert b.begin >= a.end + gap - CLOSE


def test_nothing_beats_the_lower_bound() -> None:
    reached = 0
    for _, (times, payloads, links, micro_batches), extra, schedule in settings(2, 300):
        options = {"fill_waits": schedule == ZeroBubble.name}
        trace = simulate(times, payloads, links, micro_batches, extra=extra, schedule=schedule, update=1, **options)
        bound = lower_bound(times, payloads, links, micro_batches, update=1)
        assert trace.seconds >= bound - CLOSE
        reached += trace.seconds <= bound + CLOSE
    assert reached > 50  # 72 of 300 reach it; without weight passes the bound is tighter


def test_better_links_and_faster_stages_never_slow_a_step_down() -> None:
    """Exactly, since a step consists of sums and maxima of its times."""
    for generator, (times, payloads, links, micro_batches), extra, schedule in settings(3, 150):
        before = simulate(times, payloads, links, micro_batches, extra=extra, schedule=schedule).seconds
        better = [Link(link.bandwidth * generator.choice([1, 2]), link.latency / 2) for link in links]
        after = simulate(times, payloads, better, micro_batches, extra=extra, schedule=schedule).seconds
        assert after <= before
        faster = [StageTimes(each.forward * generator.random(), each.backward, each.weights) for each in times]
        assert simulate(faster, payloads, better, micro_batches, extra=extra, schedule=schedule).seconds <= after


def test_overlap_is_never_slower_than_stock() -> None:
    """With extra 0 and any times: the same passes in the same order, and transfers that start no later."""
    for _, (times, payloads, links, micro_batches), _, _ in settings(4, 150):
        ours = simulate(times, payloads, links, micro_batches)
        stock = simulate(times, payloads, links, micro_batches, schedule="stock")
        assert ours.seconds <= stock.seconds
        for stage in range(len(times)):
            assert passes(ours, stage) == passes(stock, stage)


def test_extra_micro_batches_are_no_slower_than_stock_with_equal_stages() -> None:
    """Observed, not proved; false for unequal stages (`test_more_in_flight_can_cost`)."""
    for _, (times, payloads, links, micro_batches), _, _ in settings(5, 100):
        equal = [times[0]] * len(times)
        stock = simulate(equal, payloads, links, micro_batches, schedule="stock").seconds
        for extra in (1, 2, 3):
            assert simulate(equal, payloads, links, micro_batches, extra=extra).seconds <= stock


@pytest.mark.parametrize("extra", [0, 1])
def test_weight_passes_fill_the_bubble(extra: int) -> None:
    """8 stages, 32 micro-batches, f = b = w = 1. 1F1B takes (M + P − 1)·3. Weight passes leave what no schedule avoids: the last
    stage has nothing to do before (P − 1)·f, so that a step takes M·3 + P − 1."""
    times, payloads = [StageTimes(1, 2, 1)] * 8, [0] * 7
    schedules = OneForwardOneBackward(32, 8, extra), ZeroBubble(32, 8, extra)
    usual, split = (simulator.simulate(times, payloads, NO_TIME, schedule) for schedule in schedules)
    assert (usual.seconds, split.seconds) == (39 * 3, 32 * 3 + 7)
    assert lower_bound(times, payloads, NO_TIME, 32) == split.seconds
    assert [sum(trace.bubble) / 8 for trace in (usual, split)] == pytest.approx([7 / 39, 7 / 103])


def test_what_a_stage_does_while_it_waits() -> None:
    """Two stages, f = 1, b = 2 of which 1 for weights, transfers of 4, one weight pass held back. On stage 0, F0 and F1 are 0–2.
    Gradient 0 leaves stage 1 at 1+4+2 and is there at 11; B0 11–12, F2 12–13. Gradient 1 is there at 17, B1 17–18; gradient 2 at
    23, B2 23–24. In order, W0 comes after B1, and W1 and W2 at the end. Otherwise W0 fills 13–14 and W1 18–19."""
    schedule = ZeroBubble(3, 2, 0, 1)
    for fill_waits, begins in ((False, [18, 24, 25]), (True, [13, 18, 24])):
        trace = simulator.simulate([StageTimes(1, 2, 1)] * 2, [4], Link(1), schedule, fill_waits=fill_waits)
        weights = [x for x in trace.intervals[0] if x.instruction == "BackwardWeight" and x.end > x.begin]
        assert [(x.micro_batch, x.begin) for x in weights] == list(enumerate(begins))
        assert trace.seconds == begins[-1] + 1


def test_filling_waits_never_slows_a_step_down() -> None:
    gained = 0
    for _, (times, payloads, links, micro_batches), extra, _ in settings(6, 150):
        in_order, filled = (
            simulate(times, payloads, links, micro_batches, extra=extra, schedule="zero_bubble", fill_waits=fill_waits)
            for fill_waits in (False, True)
        )
        assert filled.seconds <= in_order.seconds + CLOSE
        assert filled.busy == pytest.approx(in_order.busy, abs=CLOSE)
        gained += filled.seconds < in_order.seconds - CLOSE
    assert gained > 30


def test_many_stages_take_seconds() -> None:
    """64 stages × 256 micro-batches, transfers half as long as both passes: hidden by one extra micro-batch per boundary."""
    begin = time.process_time()
    trace = simulate([StageTimes(1, 2)] * 64, [3] * 63, Link(2), 256, extra=1)
    assert time.process_time() - begin < 10  # takes 0.4 to 0.9 on one core of the machine that this was written on
    assert trace.seconds == 63 * (3 + 2 * 1.5) + 256 * 3


# -- errors ---------------------------------------------------------------------------------------------------------------


class FirstStageWaitsForGradients(OneForwardOneBackward):
    """The first stage waits for gradients before it sends the payloads that they follow from."""

    def instructions(self, stage: int) -> Iterator[Instruction]:
        instructions = list(super().instructions(stage))
        if stage == 0:
            instructions.sort(key=lambda instruction: instruction.kind != "RecvGrad")
        return iter(instructions)


class WithAnUnknownInstruction(OneForwardOneBackward):
    def instructions(self, stage: int) -> Iterator[Instruction]:
        yield Instruction("WeightPass", 0)
        yield from super().instructions(stage)


def test_a_deadlock_is_an_error() -> None:
    with pytest.raises(
        RuntimeError, match="no stage can advance: stage 0 in RecvGrad of micro-batch 0, stage 1 in RecvA"
    ):
        simulator.simulate([StageTimes(1, 1)] * 2, [1], Link(1), FirstStageWaitsForGradients(2, 2))


def test_an_unknown_instruction_is_an_error() -> None:
    with pytest.raises(ValueError, match="1f1b has WeightPass on stage 0, whose duration is unknown"):
        simulator.simulate([StageTimes(1, 1)] * 2, [1], Link(1), WithAnUnknownInstruction(2, 2))


def test_a_schedule_of_other_stages_is_an_error() -> None:
    with pytest.raises(ValueError, match="the schedule has 3 stages, but times are given for 2"):
        simulator.simulate([StageTimes(1, 1)] * 2, [1], Link(1), OneForwardOneBackward(2, 3))


@pytest.mark.parametrize(
    ("times", "payloads", "links", "micro_batches", "message"),
    [
        ([], [], NO_TIME, 1, "0 stages"),
        ([StageTimes(1, 1)] * 2, [], NO_TIME, 1, "2 stages, 0 payloads"),
        ([StageTimes(1, 1)] * 2, [1], [], 1, "1 payloads, 0 links"),
        ([StageTimes(1, 1)], [], NO_TIME, 0, "micro_batches=0"),
        ([StageTimes(1, -1)], [], NO_TIME, 1, "negative"),
        ([StageTimes(1, 1)] * 2, [-1], NO_TIME, 1, "negative"),
        ([StageTimes(1, 1)] * 2, [1], Link(1, -1), 1, "negative"),
        ([StageTimes(1, 1)] * 2, [1], Link(0), 1, "bandwidths must be above 0"),
    ],
)
def test_impossible_arguments(
    times: list[StageTimes], payloads: list[int], links: list[Link] | Link, micro_batches: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(times, payloads, links, micro_batches)
    with pytest.raises(ValueError, match=message):
        lower_bound(times, payloads, links, micro_batches)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="extra_in_flight=-1"):
        simulate([StageTimes(1, 1)], [], NO_TIME, 1, extra=-1)
    with pytest.raises(ValueError, match="update=-1"):
        simulate([StageTimes(1, 1)], [], NO_TIME, 1, update=-1)
    with pytest.raises(ValueError, match="flops_per_second=0"):
        stage_times(load_config(None, []), 0)


# -- from a configuration -------------------------------------------------------------------------------------------------

SHAPE = [
    "model.hidden_size=16", "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.num_hidden_layers=6",
    "data.sequence_length=8", "train.micro_batch_size=3", "parallel.pipeline_stages=3", "parallel.stage_layers=[1,2,3]",
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_stage_times(checkpointing: Checkpointing) -> None:
    """Layers by hand-made cuts, tokens of a micro-batch, the head once and last, a second forward where there is one."""
    overrides = ["model.architecture=llama", f"parallel.activation_checkpointing={str(checkpointing).lower()}"]
    config = load_config(None, [*SHAPE, *overrides])
    layer, head = layer_flops(config.model, 8)[0], head_flops(config.model)
    again = {False: 0, True: layer.forward, "selective": architecture_of(config.model).feed_forward_flops(False)}
    backward = layer.backward + again[checkpointing]
    times = stage_times(config, 1e6)
    seconds = 24 / 1e6
    forwards = [layer.forward, 2 * layer.forward, 3 * layer.forward + head.forward]
    backwards = [backward, 2 * backward, 3 * backward + head.backward]
    assert [each.forward for each in times] == pytest.approx([flops * seconds for flops in forwards])
    assert [each.backward for each in times] == pytest.approx([flops * seconds for flops in backwards])


def test_stage_times_count_routing() -> None:
    llama, lime = (
        stage_times(load_config(None, [*SHAPE, f"model.architecture={name}"]), 1e6) for name in ("llama", "lime")
    )
    assert lime[1].forward > llama[1].forward and lime[2].backward > llama[2].backward


@pytest.mark.parametrize(
    ("overrides", "item_size"),
    [
        (["precision=fp32"], 4),
        (["precision=bf16"], 2),
        (["precision=fp64"], 8),
        (["precision=fp32", "pipeline.wire_dtype=bf16"], 2),
    ],
)
def test_boundary_bytes(overrides: list[str], item_size: int) -> None:
    """Full history before layers 1 and 3: hidden 16 and as many entries of 2 · 2 heads · 4, over 3 · 8 tokens."""
    config = load_config(None, [*SHAPE, *overrides])
    assert boundary_bytes(config) == [(16 + 1 * 16) * 24 * item_size, (16 + 3 * 16) * 24 * item_size]


def test_a_configuration_can_be_simulated() -> None:
    config = load_config(None, SHAPE)
    trace = simulator.simulate(
        stage_times(config, 1e9), boundary_bytes(config), Link(1e8, 1e-5), make_schedule(config, 8)
    )
    assert len(trace.intervals) == 3 and 0 < trace.seconds < math.inf
