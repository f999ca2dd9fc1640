"""Draw one simulated step: what each stage does at which time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lime_dist.config.schema import Config
from lime_dist.errors import LimeError
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.schedules.base import RECEIVES, SENDS, Schedule, make_schedule
from lime_dist.plan.forecast import Forecast, Machine, machine_times
from lime_dist.plan.simulate import Interval, Link, simulate
from lime_dist.plan.stage_times import boundary_bytes, stage_times
from lime_dist.plan.text import idle, show_seconds

REDUCTION = "#bb5566"
"""Colour of the reduction, which follows all passes and on no stage counts as computing."""


MOST_NUMBERED = 160
"""Passes of a kind in pictures whose bars show the numbers of their micro-batches."""


def draw_timeline(config: Config, machine: Machine, planned: Forecast, path: Path) -> None:
    """Write a PNG of one step, with a row per stage. A stage is idle where its row is blank. If stages hold several parts, the colour of
    a pass says through which part it is: the later, the lighter.

    Args:
        planned: the forecast of the step, whose numbers the title repeats.

    Raises:
        LimeError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise LimeError("--timeline needs matplotlib: pip install -c constraints.txt -e '.[analysis]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    bounds = stage_bounds(config)
    micro_batches = planned.micro_batches
    schedule = make_schedule(config, micro_batches)
    trace = simulate(
        machine_times(config, machine, bounds, stage_times(config, 1.0, bounds)),
        boundary_bytes(config, bounds),
        Link(machine.bandwidth, machine.latency),
        schedule,
    )
    whole, reduction = planned.seconds, planned.parts.reduction
    scale, unit = (1.0, "s") if whole >= 1 else (1e3, "ms") if whole >= 1e-3 else (1e6, "µs")
    stages = len(trace.intervals)
    figure, axes = pyplot.subplots(figsize=(14, min(20.0, 1.8 + 0.45 * stages)))
    for stage, intervals in enumerate(trace.intervals):
        draw_stage(axes, stage, intervals, scale, schedule)
        if reduction:
            axes.broken_barh(
                [(scale * (whole - reduction), scale * reduction)], (stage - 0.42, 0.84), facecolors=REDUCTION
            )
    axes.set_ylim(stages - 0.5, -0.5)
    axes.set_xlim(0, scale * whole)
    axes.set_yticks(range(0, stages, max(1, stages // 32)))
    axes.set_ylabel("stage")
    axes.set_xlabel(f"{unit} from the start of the step")
    of_parts = f" of {schedule.parts} parts (later ones lighter)" if schedule.parts > 1 else ""
    axes.set_title(
        f"{stages} stages{of_parts}, {micro_batches} micro-batches, {show_seconds(whole)}; idle: {idle(planned.bubble)}"
    )
    used = {x.instruction for intervals in trace.intervals for x in intervals if x.end > x.begin}
    legend = [Patch(color=colour, label=name) for kind, (name, colour) in schedule.legend.items() if kind in used]
    if reduction:
        legend.append(Patch(color=REDUCTION, label="reduction"))
    figure.legend(handles=legend, loc="lower center", ncols=len(legend), frameon=False)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise LimeError(f"--timeline {path} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def draw_stage(axes: Any, stage: int, intervals: Sequence[Interval], scale: float, schedule: Schedule) -> None:
    """Draw the row of a stage.

    Args:
        scale: units of the axis per second.
    """
    is_numbered = schedule.stages * schedule.micro_batches * schedule.parts <= MOST_NUMBERED
    edge = {"edgecolor": "white", "linewidth": 0.4} if is_numbered else {"linewidth": 0}
    for kind, (_, colour) in schedule.legend.items():
        shown = [x for x in intervals if x.instruction == kind and x.end > x.begin]
        if not shown:
            continue
        is_pass = kind not in SENDS | RECEIVES
        bars = [(scale * x.begin, scale * (x.end - x.begin)) for x in shown]
        colours = [shade(colour, x.part, schedule.parts) if is_pass else colour for x in shown]
        axes.broken_barh(bars, (stage - 0.42, 0.84), facecolors=colours, **edge)
        if is_numbered and is_pass:
            for x in shown:
                place = (scale * (x.begin + x.end) / 2, stage)
                axes.annotate(str(x.micro_batch), place, ha="center", va="center", fontsize=7, color="white")


def shade(colour: str, part: int, parts: int) -> str:
    """The colour ``#rrggbb`` of a pass through a part of a stage: that of the first part, mixed with 40 % of white for the last one."""
    white = 0.4 * part / max(1, parts - 1)
    return "#" + "".join(f"{round(int(colour[i : i + 2], 16) * (1 - white) + 255 * white):02x}" for i in (1, 3, 5))
