"""Format the numbers of a plan as tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from lime_dist.config.schema import Config
from lime_dist.plan.quantities import show, show_hours, show_seconds

Values = dict[str, Any]
"""The result of ``plan_values`` or ``sweep_values`` in `lime_dist.plan.__main__`."""

COLUMNS = [
    "stage", "layers", "parameters", "forward", "backward", "weights", "optimizer", "activations", "history", "transfers",
    "working", "peak", "in flight", "to next", "what crosses",
]  # fmt: skip


def plan_table(config: Config, values: Values) -> str:
    """A plan as text."""
    train, parallel, model = config.train, config.parallel, config.model
    lines = [
        f"{model.architecture}, {model.num_hidden_layers} layers, {values['parameters']:,} parameters; "
        f"{parallel.pipeline_stages} stage(s) × {values['replicas']} replica(s); {values['micro_batches']} micro-batches of "
        f"{train.micro_batch_size} × {config.data.sequence_length} tokens per step and replica; {config.precision}",
        f"a process reaches {show(values['machine']['flops'], 'FLOP/s')} and "
        f"{show(values['machine']['memory_bandwidth'], 'B/s')} of memory traffic; {show(values['machine']['bandwidth'], 'B/s')} and "
        f"{show_seconds(values['machine']['latency'])} between processes",
        "",
        *columns([COLUMNS, *(stage_row(row) for row in values["stages"])]),
        "",
        "forward, backward: FLOPs of a micro-batch; memory at the peak of a step "
        f"(schedule {config.pipeline.schedule}), with the number of micro-batches in flight;",
        f"to next: bytes of a micro-batch{wire_of(config)}; its gradient has as many ({boundary_of(config)}).",
        "",
    ]
    if values["checkpointing_choice"] is not None:
        lines += [values["checkpointing_choice"], ""]
    peak, memory = values["peak_memory"], values["machine"]["memory"]
    limit = "" if memory is None else f" of {show(memory, 'B')}: {'it fits' if values['fits'] else 'it DOES NOT FIT'}"
    lines.append(f"memory    {show(peak, 'B')} on the fullest stage{limit}")
    if (waiting := max(row["memory"]["host"] for row in values["stages"])) > 0:
        lines.append(f"          and up to {show(waiting, 'B')} of host memory a process, where histories wait")
    if values["replicas"] > 1:
        lines.append(replicas_line(config, values))
    parts = ", ".join(f"{name} {share(values, name)}" for name, seconds in values["seconds"].items() if seconds)
    lines.append(
        f"step      {show_seconds(values['seconds_per_step'])} predicted, {show(values['tokens_per_second'])} tokens/s: {parts}"
    )
    lines.append(
        f"idle      {idle(values['bubble'])} of the step: on average a stage does not compute{least_idle(config, values)}"
    )
    largest, *others = sorted(values["seconds"], key=lambda name: -values["seconds"][name])
    lines.append(f"limit     {largest}, {share(values, largest)} of the step: {explain(values, largest)}")
    if values["seconds"][largest] < values["seconds_per_step"] / 2:
        lines.append(f"          then {others[0]}, {share(values, others[0])}: {explain(values, others[0])}")
    lines.append(
        f"run       {train.steps:,} steps: {show(values['total_tokens'])} tokens, {show_hours(values['total_hours'])} without "
        "validations and checkpoints"
    )
    if config.data.document_mask:
        share_left = 2 * values["keys_per_token"] / (config.data.sequence_length + 1)
        lines.append(
            f"documents attention reads {values['keys_per_token']:,.0f} tokens on average, {share_left:.0%} of those without "
            "data.document_mask; 100 % if the data are not here"
        )
    if "over_llama" in values:
        over = values["over_llama"]
        lines.append(
            f"over LLaMA, same settings: FLOPs × {over['flops']:.3f}, memory × {over['memory']:.3f}, "
            f"time × {over['time']:.3f}"
        )
    return "\n".join(lines)


def replicas_line(config: Config, values: Values) -> str:
    """What a process exchanges with the other replicas of its stage, on the stage where that is most."""
    most = max((row["between_replicas"] for row in values["stages"]), key=lambda exchange: exchange["sent"])
    sharded = config.parallel.zero_stage == 1
    calls = (
        f"{most['calls'] // 2} reduce-scatters and as many all-gathers" if sharded else f"{most['calls']} all-reduces"
    )
    return f"replicas  a process sends the others {show(most['sent'], 'B')} a step, in {calls}"


def boundary_of(config: Config) -> str:
    """What decides what crosses."""
    if config.parallel.parts_per_stage > 1:
        return f"from {config.parallel.parts_per_stage} parts; the next stage keeps entries, so each is sent once"
    return f"pipeline.boundary={config.pipeline.boundary}"


def wire_of(config: Config) -> str:
    """In which form payloads are sent, if it is not that of the run."""
    sent = config.pipeline.wire_dtype
    return "" if sent is None else f", sent with pipeline.wire_dtype={sent}"


def stage_row(row: Values) -> list[str]:
    layers = ", ".join(f"{begin}–{end - 1}" for begin, end in row.get("parts", [row["layers"]]))
    memory = row["memory"]
    parts = ("weights", "optimizer", "activations", "history", "transfers", "working", "peak")
    return [
        str(row["stage"]), layers, f"{row['parameters']:,}", show(row["forward_flops"]),
        show(row["backward_flops"]), *(show(memory[name], "B") for name in parts), str(memory["in_flight"]),
        show(row["bytes_to_next"], "B") if row["bytes_to_next"] else "",
        row["crosses_to_next"] or "",
    ]  # fmt: skip


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def idle(bubble: float) -> str:
    """The share of the step in which stages do not compute, as the text and the timeline show it."""
    return f"{100 * bubble:.1f} %"


def least_idle(config: Config, values: Values) -> str:
    """What equal parts and transfers that take no time would leave idle, if stages hold several parts; else nothing."""
    stages, parts, micro_batches = len(values["stages"]), config.parallel.parts_per_stage, values["micro_batches"]
    if parts == 1 or micro_batches < stages:
        return ""
    least = (stages - 1) / (parts * micro_batches + stages - 1)
    return f"; with equal parts and free transfers, (P − 1)/(V·m + P − 1) = {idle(least)}"


def share(values: Values, name: str) -> str:
    """The share of the step that a part takes."""
    return f"{100 * values['seconds'][name] / values['seconds_per_step']:.1f} %"


def explain(values: Values, part: str) -> str:
    """A line that says what a part of the step means and how to lower it."""
    stages = values["stages"]
    passes = [row["forward_flops"] + row["backward_flops"] for row in stages]
    busiest, widest = passes.index(max(passes)), max(range(len(stages)), key=lambda s: stages[s]["bytes_to_next"])
    return {
        "computation": "stages compute (faster devices, or more of them; a smaller model)",
        "imbalance": f"stage {busiest} computes {max(passes) * len(passes) / sum(passes):.1f} times the average "
        "(parallel.stage_layers; fewer stages; the last stage has the output projection)",
        "link": f"stage {widest} sends {show(stages[widest]['bytes_to_next'], 'B')} per micro-batch "
        "(pipeline.wire_dtype; a bounded history; pipeline.extra_in_flight)",
        "bubble": f"{values['micro_batches']} micro-batches per step fill and drain {len(stages)} stages (smaller micro-batches; "
        "fewer stages; parallel.virtual_stages)",
        "latency": "transfers are short and many (larger micro-batches; fewer stages)",
        "reduction": "gradients are still being reduced after the passes (fewer replicas; a larger global batch)",
    }[part]


def sweep_table(values: Values, memory: float | None) -> str:
    """A sweep as text."""
    limit = "" if memory is None else f" of {show(memory, 'B')}"
    lines = [
        f"{values['tried']} settings tried, {values['fitting']} fit" + (f" in {show(memory, 'B')}" if memory else "")
    ]
    if values["best"]:
        header = ["", "stages × replicas", "micro-batch", "history", "step", "memory", "reason"]
        rows = [
            [
                str(number), stages(row), str(row["micro_batch_size"]),
                history(row["history"]), show_seconds(row["seconds_per_step"]), show(row["peak_memory"], "B") + limit,
                reason(row),
            ]
            for number, row in enumerate(values["best"], 1)
        ]  # fmt: skip
        lines += [
            "",
            *columns([header, *rows]),
            "",
            "overrides, to paste after the command of pretrain.py or of the plan:",
        ]
        lines += [f"{number}  {shlex.join(row['overrides'])}" for number, row in enumerate(values["best"], 1)]
    if (smallest := values["smallest_that_does_not_fit"]) is not None:
        lines += [
            "",
            f"of those that do not fit, {smallest['pipeline_stages']} stages × micro-batch {smallest['micro_batch_size']} × "
            f"{history(smallest['history'])} needs the least memory: {show(smallest['peak_memory'], 'B')}",
        ]
    lines += ["", "Ranked by time only; benchmarks/RESULTS.md compares how well the policies learn. All micro-batch sizes are assumed",
              "equally efficient; of those whose times differ by less than 1 %, only the largest is shown."]  # fmt: skip
    return "\n".join(lines)


def stages(row: Values) -> str:
    """Stages × replicas, such as 8 × 2, or 8 (2 parts each) × 2."""
    parts = f" ({row['virtual_stages']} parts each)" if row["virtual_stages"] > 1 else ""
    return f"{row['pipeline_stages']}{parts} × {row['replicas']}"


def history(policy: Values | None) -> str:
    """A policy and its keys, such as first_last, first 2, last 1."""
    if policy is None:
        return "–"
    return ", ".join(str(value) if key == "policy" else f"{key} {value}" for key, value in policy.items())


def reason(row: Values) -> str:
    """The parts of its step that take at least one percent, largest first."""
    parts = sorted(row["seconds"].items(), key=lambda part: -part[1])
    whole = row["seconds_per_step"]
    return ", ".join(f"{name} {100 * seconds / whole:.0f} %" for name, seconds in parts if seconds >= 0.01 * whole)
