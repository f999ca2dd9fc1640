"""The console output of a run: one line per interval, and a progress bar if the output is a terminal."""

from __future__ import annotations

import contextlib
import sys

from tqdm import tqdm


class Console:
    """Prints on one rank only; the progress bar shows the steps and the time left.

    Args:
        enabled: whether this rank prints.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: tqdm[None] | None = None

    def start(self, step: int, steps: int) -> None:
        """Show the progress bar, if the output is a terminal."""
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(initial=step, total=steps, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def go_back(self, step: int) -> None:
        """Set the progress bar back to a step."""
        if self._bar is not None:
            self._bar.n = step

    def say(self, line: str) -> None:
        """Print a line. A closed pipe, or a log on a full disk, does not stop training."""
        if not self._enabled:
            return
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(line)
            else:
                print(line, flush=True)

    def step_line(self, record: dict[str, float | int], steps: int) -> None:
        """Print the record of a step in one line."""
        left = (steps - record["step"]) * record["step_seconds"]
        self.say(
            f"step {record['step']}/{steps} | loss {record['loss']:.4f} | gradient norm {record['grad_norm']:.3f} | "
            f"lr {record['lr']:.2e} | router lr {record['router_lr']:.2e} | "
            f"{record['tokens_per_second']:,.0f} tokens/s | {record['step_seconds']:.2f} s/step | {duration(left)} left"
        )

    def time_split(self, split: dict[str, float]) -> None:
        """Print how the time of this start divides among kinds of work, in percent.

        Args:
            split: seconds by kind of work.
        """
        whole = sum(split.values())
        if whole > 0:
            parts = ", ".join(f"{kind} {100 * seconds / whole:.1f} %" for kind, seconds in split.items())
            self.say(f"{duration(whole)} of training: {parts} (mean over ranks)")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """A duration in the form 42s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
