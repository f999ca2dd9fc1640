"""Questions about a graph of made-up concepts: a person is one of two concepts, and only a chain of facts says which.

The facts form two trees of concepts, with cross links. The person is the root of the first tree. The right answer lies
``hops`` steps below this root; the wrong one lies as many steps below the root of the second tree, which no path from the
first tree reaches. A single path leads to the right answer, so each question has one solution.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from lime_dist.errors import LimeError

PEOPLE = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo June Kai Lea Max Nora Otto Pia".split()
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Graph:
    """Questions over ``concepts`` concepts, named with ``names`` made-up words, whose answer lies ``hops`` facts away.

    Raises:
        LimeError: a setting is out of range.
    """

    concepts: int
    hops: int
    names: int

    def __post_init__(self) -> None:
        if not 1 <= self.hops <= 64:
            raise LimeError(f"--hops {self.hops}: must be from 1 to 64")
        if not 2 * (self.hops + 1) <= self.concepts <= 256:
            raise LimeError(
                f"--concepts {self.concepts}: must be from {2 * (self.hops + 1)} (two chains of --hops {self.hops} facts) to 256"
            )
        if not self.concepts <= self.names <= 10_000:
            raise LimeError(f"--names {self.names}: must be from --concepts {self.concepts} to 10000")

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """Return a question and its solution: the chain of facts and the conclusion, one per line."""
        names = generator.sample(make_names(self.names), self.concepts)
        person = generator.choice(PEOPLE)
        facts = [f"Every {names[child]} is a {names[parent]}." for child, parent in self._edges(generator)]
        facts.append(f"{person} is a {names[0]}.")
        generator.shuffle(facts)
        right, wrong = names[self.hops], names[2 * self.hops + 1]
        one, other = generator.sample([right, wrong], 2)
        chain = [f"Every {names[step]} is a {names[step + 1]}." for step in range(self.hops)]
        question = " ".join([*facts, f"Is {person} a {one} or a {other}?"])
        return question, "\n".join([f"{person} is a {names[0]}.", *chain, f"{person} is a {right}."])

    def _edges(self, generator: random.Random) -> list[tuple[int, int]]:
        """Draw the facts (x, y), "every x is a y".

        Concepts 0 … hops are the chain to the right answer, hops + 1 … 2·hops + 1 the chain to the wrong one. One or two
        earlier concepts lead to each of the others, and none of these leads back to a chain.
        """
        length = self.hops + 1
        sides = [list(range(length)), list(range(length, 2 * length))]
        edges = [(step, step + 1) for side in sides for step in side[:-1]]
        for concept in range(2 * length, self.concepts):
            side = generator.randrange(2)
            sources = {generator.choice(sides[side])}
            if generator.random() < 0.5:
                # A concept of the first tree may also be reached from the second, but never the other way round.
                sources.add(generator.choice([*sides[1], *sides[0]] if side == 0 else sides[1]))
            edges.extend((source, concept) for source in sorted(sources))
            sides[side].append(concept)
        return edges


@cache
def make_names(count: int) -> list[str]:
    """Return distinct made-up words of two or three syllables; they do not depend on the seed, so one tokenizer fits all."""
    generator, names = random.Random(0), dict[str, None]()
    while len(names) < count:
        syllables = generator.randint(2, 3)
        names["".join(generator.choice(CONSONANTS) + generator.choice(VOWELS) for _ in range(syllables))] = None
    return list(names)
