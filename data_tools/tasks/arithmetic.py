"""Arithmetic questions: nested expressions over small integers, solved by reducing one level at a time.

An expression is built backwards from its value: one of its numbers is replaced by an operation that gives this number,
until there are enough operands. So no division leaves a remainder, and no intermediate result is negative or too large.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lime_dist.errors import LimeError

PRECEDENCE = {"+": 0, "-": 0, "*": 1, "/": 1}

Expression = int | tuple[str, "Expression", "Expression"]
"""A number, or an operator with its two operands."""


@dataclass(frozen=True)
class Arithmetic:
    """Questions with ``operands`` numbers of at most ``largest``.

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
        """Return a question and its solution: the expression after each reduction, joined by ``=``."""
        expression: Expression = generator.randint(0, self.largest)
        for number in range(1, self.operands):
            expression = self._expand(expression, generator.randrange(number), generator)
        steps = []
        question = write(expression)
        while not isinstance(expression, int):
            expression = reduce(expression)
            steps.append(write(expression))
        return question, "=".join(steps)

    def _expand(self, expression: Expression, index: int, generator: random.Random) -> Expression:
        """Replace the number at ``index``, counted from the left, by an operation with its value."""
        if isinstance(expression, int):
            return self._operation(expression, generator)
        operator, left, right = expression
        width = count_operands(left)
        if index < width:
            return operator, self._expand(left, index, generator), right
        return operator, left, self._expand(right, index - width, generator)

    def _operation(self, value: int, generator: random.Random) -> Expression:
        """Draw an operation with this value; it never adds or subtracts 0, or multiplies or divides by 1."""
        pairs = {
            "+": [(left, value - left) for left in range(1, value)],
            "-": [(left, left - value) for left in range(value + 1, self.largest + 1)],
            "*": [(left, value // left) for left in range(2, value // 2 + 1) if value % left == 0],
            "/": [(value * right, right) for right in range(2, self.largest // value + 1)] if value else [],
        }
        operator = generator.choice([operator for operator, operands in pairs.items() if operands])
        return operator, *generator.choice(pairs[operator])


def count_operands(expression: Expression) -> int:
    """Count the numbers in an expression."""
    return 1 if isinstance(expression, int) else count_operands(expression[1]) + count_operands(expression[2])


def write(expression: Expression) -> str:
    """Return the expression as text, with no more brackets than the usual order of operations needs."""
    if isinstance(expression, int):
        return str(expression)
    operator, left, right = expression
    precedence = PRECEDENCE[operator]
    first, second = write(left), write(right)
    if not isinstance(left, int) and PRECEDENCE[left[0]] < precedence:
        first = f"({first})"
    if not isinstance(right, int) and PRECEDENCE[right[0]] <= precedence:
        second = f"({second})"
    return f"{first}{operator}{second}"


def reduce(expression: Expression) -> Expression:
    """Replace every operation whose two operands are numbers by its value."""
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
