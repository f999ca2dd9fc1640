"""Arithmetic questions: nested expressions over small whole numbers, solved by reducing one level at a time.

An expression grows backwards from its value: a number of it is replaced by an operation that gives this number, until there
are enough operands. So no division leaves a remainder, and no value on the way is negative or above the largest.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lime_dist.errors import LimeError

PRECEDENCE = {"+": 0, "-": 0, "*": 1, "/": 1}

Expression = int | tuple[str, "Expression", "Expression"]
"""A number, or an operator with its two sides."""


@dataclass(frozen=True)
class Arithmetic:
    """Questions with ``operands`` numbers from 1 to ``largest``.

    Raises:
        LimeError: a setting is out of range.
    """

    operands: int
    largest: int

    def __post_init__(self) -> None:
        if not 2 <= self.operands <= 64:
            raise LimeError(f"--operands {self.operands}: must be from 2 to 64")
        if not 4 <= self.largest <= 10_000:
            raise LimeError(f"--largest {self.largest}: must be from 4 to 10000")

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """A question, and its solution: every reduction after the question, joined by ``=``."""
        expression: Expression = generator.randint(0, self.largest)
        for number in range(1, self.operands):
            expression = self._expand(expression, generator.randrange(number), generator)
        steps = []
        question = write(expression)
        while not isinstance(expression, int):
            expression = reduce(expression)
            steps.append(write(expression))
        return question, "=".join(steps)

    def _expand(self, expression: Expression, place: int, generator: random.Random) -> Expression:
        """Replace the number at a place, counted from the left, by an operation with its value."""
        if isinstance(expression, int):
            return self._operation(expression, generator)
        operator, left, right = expression
        width = count_operands(left)
        if place < width:
            return operator, self._expand(left, place, generator), right
        return operator, left, self._expand(right, place - width, generator)

    def _operation(self, value: int, generator: random.Random) -> Expression:
        """An operation with this value; none that adds nothing or multiplies by one."""
        pairs = {
            "+": [(left, value - left) for left in range(1, value)],
            "-": [(left, left - value) for left in range(value + 1, self.largest + 1)],
            "*": [(left, value // left) for left in range(2, value // 2 + 1) if value % left == 0],
            "/": [(value * right, right) for right in range(2, self.largest // value + 1)] if value else [],
        }
        operator = generator.choice([operator for operator, found in pairs.items() if found])
        return operator, *generator.choice(pairs[operator])


def count_operands(expression: Expression) -> int:
    """The numbers in an expression."""
    return 1 if isinstance(expression, int) else count_operands(expression[1]) + count_operands(expression[2])


def write(expression: Expression) -> str:
    """The expression with the brackets that the usual order of operations needs."""
    if isinstance(expression, int):
        return str(expression)
    operator, left, right = expression
    rank = PRECEDENCE[operator]
    first, second = write(left), write(right)
    if not isinstance(left, int) and PRECEDENCE[left[0]] < rank:
        first = f"({first})"
    if not isinstance(right, int) and PRECEDENCE[right[0]] <= rank:
        second = f"({second})"
    return f"{first}{operator}{second}"


def reduce(expression: Expression) -> Expression:
    """Put its value in the place of every operation whose two sides are numbers."""
    if isinstance(expression, int):
        return expression
    operator, left, right = expression
    if not isinstance(left, int) or not isinstance(right, int):
        return operator, reduce(left), reduce(right)
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left // right
