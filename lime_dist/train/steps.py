"""A range of steps on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lime_dist.errors import LimeError


@dataclass(frozen=True)
class Steps:
    """The steps ``first`` to ``last``, counted from 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Steps:
        """Read ``20`` or ``20-22``.

        Raises:
            LimeError: it is neither.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        steps = None if match is None else cls(int(match[1]), int(match[2] or match[1]))
        if steps is None or not 1 <= steps.first <= steps.last:
            raise LimeError(f"pretrain.py --profile {text}: give a step or a range of steps, such as 20 or 20-22")
        return steps

    def check(self, done: int, steps: int) -> None:
        """
        Raises:
            LimeError: the run does not make all of these steps.
        """
        if self.first <= done or self.last > steps:
            raise LimeError(
                f"pretrain.py --profile {self}: this start makes steps {done + 1} to {steps}; choose among these"
            )

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
