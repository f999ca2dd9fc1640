"""Cut a text too long to encode at once, where no token reaches over the cut, so that its ids stay what they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

SPACE_MARK = "\u2581"
"""sentencepiece's stand-in for a space. In a text of its own it would be decoded to a space."""


def last_blank(text: str, start: int, end: int) -> int:
    """The last place in (start, end] after a newline, else before a run of spaces; ``start`` if there is neither."""
    place = text.rfind("\n", start, end) + 1
    if place <= start:
        place = text.rfind(" ", start + 1, end)
        while place > start and text[place - 1] == " ":
            place -= 1  # to the beginning of a run of spaces, which may be one token
    return max(place, start)


def last_word(text: str, start: int, end: int) -> int:
    """The last place in (start, end] before a space, or after a newline, that stands alone between a character that is
    no white space and a letter or digit; ``start`` if there is none.

    Only there do the expressions that byte-level vocabularies split texts with (GPT-2's, LLaMA-3's and their like)
    part a text whatever stands further left and right: two newlines may be one token, and so may a newline with the
    space before it, and what becomes of a run of white space depends on what follows it.
    """
    for right in range(end, start + 1, -1):  # right: a place after the blank
        if text[right - 1] in " \n" and not text[right - 2].isspace() and text[right : right + 1].isalnum():
            place = right if text[right - 1] == "\n" else right - 1
            if place > start:
                return place
    return start


@dataclass(frozen=True)
class CutRule:
    """Where to cut: ``last(text, start, end)`` gives the last place, ``crossed`` matches tokens that reach over one."""

    last: Callable[[str, int, int], int]
    crossed: re.Pattern[str]


AT_BLANKS = CutRule(last_blank, re.compile(r"[^ ] |\n.", re.DOTALL))
BETWEEN_WORDS = CutRule(last_word, re.compile(r"\S |\n[\w\ufffd]"))


def cut(text: str, limit: int, rule: CutRule = AT_BLANKS) -> list[str]:
    """Cut a text into pieces of at most ``limit`` characters whose concatenation is the text.

    The cuts are at the rule's places, where no token of a fitting vocabulary crosses, so that encoding the pieces one
    by one gives the same ids. Only where ``limit`` characters have no such place does the cut fall anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        end = rule.last(text, start, start + limit)
        end = end if end > start else start + limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
