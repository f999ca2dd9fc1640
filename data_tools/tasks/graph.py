"""Questions about a graph of made-up concepts: of two concepts somebody is one, and only a chain of facts says which.

The facts draw two trees of concepts, with cross links. Somebody is the root of the first; the right answer lies so many steps below
it, the wrong one as many below the root of the second, which nothing of the first leads to. One path alone leads to the right
answer, so that a question has one solution.
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
    """Questions over ``concepts`` concepts, whose answer lies ``hops`` facts away; they are named out of ``names`` words.

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
                f"--concepts {self.concepts}: must be from {2 * (self.hops + 1)}, two chains of --hops {self.hops} facts, to 256"
            )
        if not self.concepts <= self.names <= 10_000:
            raise LimeError(f"--names {self.names}: must be from --concepts {self.concepts} to 10000")

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """A question, and its solution: the chain of facts and the conclusion, one a line."""
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
        """Facts (x, y), every x is a y. 0 … hops is the chain to the right answer, hops + 1 … 2·hops + 1 the other one.

        What is added below the chains has one or two concepts that lead to it, and leads back to no chain.
        """
        length = self.hops + 1
        sides = [list(range(length)), list(range(length, 2 * length))]
        edges = [(step, step + 1) for side in sides for step in side[:-1]]
        for concept in range(2 * length, self.concepts):
            side = generator.randrange(2)
            sources = {generator.choice(sides[side])}
            if generator.random() < 0.5:
                # What somebody is may be reached from the second tree too, but not the other way.
                sources.add(generator.choice([*sides[1], *sides[0]] if side == 0 else sides[1]))
            edges.extend((source, concept) for source in sorted(sources))
            sides[side].append(concept)
        return edges


@cache
def make_names(count: int) -> list[str]:
    """Different words of two or three syllables that mean nothing: the same whatever the seed, so that one tokenizer serves."""
    generator, names = random.Random(0), dict[str, None]()
    while len(names) < count:
        syllables = generator.randint(2, 3)
        names["".join(generator.choice(CONSONANTS) + generator.choice(VOWELS) for _ in range(syllables))] = None
    return list(names)
