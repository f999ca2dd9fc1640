"""The console output of a run: one line per interval, a progress bar if the output is a terminal, and a log file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from lime_dist.data.files import WholeAppends
from lime_dist.errors import LimeError, PeerLost, drop_closed_output


class Console:
    """Prints on one rank only, and keeps a log; the progress bar shows the steps and the time left.

    Args:
        enabled: whether this rank prints.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: tqdm[None] | None = None
        self._log: WholeAppends | None = None
        self._early: list[bytes] = []  # lines for the log, before it is open

    @contextlib.contextmanager
    def logging(self, path: Path) -> Iterator[None]:
        """Append all lines to a file too, each with its date and time, and the error that ends the run.

        What was said before is added now. A disk that refuses does not stop training.
        """
        if self._enabled:
            with contextlib.suppress(OSError):
                torn = _is_torn(path)
                self._log = WholeAppends(path)
                self._log.write((b"\n" if torn else b"") + b"".join(self._early))  # torn by a crash
                self._early.clear()
        try:
            yield
        except BaseException as error:
            kind = "error" if isinstance(error, (LimeError, PeerLost)) else type(error).__name__
            self.note(f"{kind}: {error}".partition("\n")[0])
            raise

    def start(self, step: int, steps: int) -> None:
        """Show the progress bar, if the output is a terminal."""
        if self._enabled and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(initial=step, total=steps, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.update()

    def go_back(self, step: int) -> None:
        """Set the progress bar back to a step."""
        if self._bar is not None:
            self._bar.n = step

    def say(self, line: str) -> None:
        """Print a line. A closed pipe, or a log on a full disk, does not stop training."""
        if not self._enabled:
            return
        self.note(line)
        try:
            if self._bar is not None:
                self._bar.write(line)
            else:
                print(line, flush=True)
        except BrokenPipeError:
            drop_closed_output()
        except OSError:
            pass

    def note(self, line: str) -> None:
        """Write a line to the log alone."""
        if not self._enabled:
            return
        dated = f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n".encode(errors="backslashreplace")
        if self._log is None:
            self._early.append(dated)
            return
        self._log.write(dated)
        with contextlib.suppress(OSError):
            self._log.flush()

    def step_line(self, record: dict[str, float | int], steps: int) -> None:
        """Print the record of a step in one line, with the time of day.

        Args:
            record: its loss is the mean since the last line; its speed and step time are the median of recent steps.
        """
        left = (steps - record["step"]) * record["step_seconds"]
        self.say(
            f"step {record['step']}/{steps} | loss {record['loss']:.4f} | gradient norm {record['grad_norm']:.3f} | "
            f"lr {record['lr']:.2e} | router lr {record['router_lr']:.2e} | "
            f"{record['tokens_per_second']:,.0f} tokens/s | {record['step_seconds']:.2f} s/step | {duration(left)} left | "
            f"{datetime.now():%H:%M:%S}"
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
        """Remove the progress bar. The log stays open until the process ends."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None


def _is_torn(path: Path) -> bool:
    """Whether a file ends within a line, as after a crash."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def duration(seconds: float) -> str:
    """A duration in the form 42s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
