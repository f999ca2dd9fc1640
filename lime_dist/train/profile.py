"""Traces of a few steps, one file a rank, and a table of where their time went: ``pretrain.py --profile STEPS``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from lime_dist.errors import LimeError
from lime_dist.pipeline.clock import INSTRUCTIONS
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.train.steps import Steps

OPERATORS = 15
"""Number of operators in the table of each rank."""


@dataclass(frozen=True)
class RankSummary:
    """Where the time of one rank went.

    Attributes:
        seconds: by kind of instruction, on its host.
        operators: those that took most time: name, calls, and seconds without those of the operators that they called; on a GPU
            the device's.
    """

    stage: int
    replica: int
    seconds: dict[str, float]
    operators: list[tuple[str, int, float]]


class Profiler:
    """Records the steps of this rank.

    Args:
        directory: folder of the traces; each rank writes its own.

    Attributes:
        is_over: whether the newest step was the last one of a record.
    """

    def __init__(self, steps: Steps, directory: Path) -> None:
        self.steps, self.directory = steps, directory / f"steps{steps}"
        self.is_over = False
        self._profile: profile | None = None
        self._is_recording = False

    @contextmanager
    def step(self, step: int, engine: LimeEngine) -> Iterator[None]:
        """Around a training step: record it if it is one of the chosen ones. If the first of them comes again, after a spike, the
        record begins anew."""
        self.is_over = False
        if step == self.steps.first:
            self.stop(engine)
            kinds = [ProfilerActivity.CPU]
            if engine.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=kinds)
            self._profile.start()
            engine.names_instructions = self._is_recording = True
        yield
        if step == self.steps.last:
            self.is_over = self.stop(engine)

    def stop(self, engine: LimeEngine) -> bool:
        """Stop recording; returns whether there was a record to stop."""
        was_recording, self._is_recording = self._is_recording, False
        if was_recording and self._profile is not None:
            engine.names_instructions = False
            self._profile.stop()
        return was_recording

    def write_trace(self, rank: int) -> None:
        """Write this rank's trace, which Perfetto and Chrome open.

        Raises:
            LimeError: it cannot be written.
        """
        assert self._profile is not None
        path = self.directory / f"rank{rank}.json.gz"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            raise LimeError(f"pretrain.py --profile: {path} cannot be written: {error}") from None

    def summary(self, engine: LimeEngine) -> RankSummary:
        """What the summary says of this rank."""
        assert self._profile is not None
        seconds: dict[str, float] = defaultdict(float)
        averages = self._profile.key_averages()
        for event in averages:
            kind = event.key.partition(" ")[0]
            if event.is_user_annotation and kind in INSTRUCTIONS:
                seconds[kind] += event.cpu_time_total / 1e6
        on_device = engine.device.type == "cuda"
        operators = [
            (event.key, event.count, (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6)
            for event in averages
            if not event.is_user_annotation
        ]
        operators.sort(key=lambda each: -each[2])
        replica = int(engine.grid.get_data_parallel_rank())
        return RankSummary(engine.stage_id, replica, dict(seconds), operators[:OPERATORS])

    def write_summary(self, ranks: Sequence[RankSummary]) -> Path:
        """Write the table of all ranks beside the traces; returns its path. Rank 0 calls it.

        Raises:
            LimeError: it cannot be written.
        """
        path = self.directory / "summary.md"
        try:
            path.write_text(describe(self.steps, ranks), encoding="utf-8")
        except OSError as error:
            raise LimeError(f"pretrain.py --profile: {path} cannot be written: {error.strerror}") from None
        return path


def describe(steps: Steps, ranks: Sequence[RankSummary]) -> str:
    """The summary, in Markdown."""
    kinds = [kind for kind in INSTRUCTIONS if any(kind in one.seconds for one in ranks)]
    rows = [
        [str(rank), str(one.stage), str(one.replica), *(f"{one.seconds.get(kind, 0.0):.3f}" for kind in kinds)]
        for rank, one in enumerate(ranks)
    ]
    parts = [
        f"# Steps {steps}\n\nSeconds that each rank's host spent in instructions. On a GPU, which works on while its host goes on, the "
        "traces show the device's time.\n",
        _table(["rank", "stage", "replica", *kinds], rows),
    ]
    for rank, one in enumerate(ranks):
        operators = [[name, str(calls), f"{seconds:.3f}"] for name, calls, seconds in one.operators]
        parts.append(f"## Rank {rank}: the operators that took most time\n")
        parts.append(_table(["operator", "calls", "seconds"], operators))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])
