"""Cut a text that is too long to encode at once, at places that no token crosses, so that its ids stay the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

SPACE_MARK = "\u2581"
"""sentencepiece's replacement for a space. If a text itself contains it, it would be decoded to a space."""


def last_blank(text: str, start: int, end: int) -> int:
    """The last place in (start, end] after a newline, else the last one before a run of spaces, else ``start``."""
    place = text.rfind("\n", start, end) + 1
    if place <= start:
        place = text.rfind(" ", start + 1, end)
        while place > start and text[place - 1] == " ":
            place -= 1  # to the beginning of the run, which may be a single token
    return max(place, start)


def last_word(text: str, start: int, end: int) -> int:
    """The last place in (start, end] before a single space or after a single newline, else ``start``.

    The character before the space or newline must not be white space, the one after it must be a letter or digit. Only
    there do the regular expressions of byte-level vocabularies (GPT-2, LLaMA-3 and similar) always split a text, whatever
    lies further left and right: two newlines, or a space and a newline, may be one token, and the tokens of a run of
    white space depend on what follows it.
    """
    for right in range(end, start + 1, -1):  # right: a place after the blank
        if text[right - 1] in " \n" and not text[right - 2].isspace() and text[right : right + 1].isalnum():
            place = right if text[right - 1] == "\n" else right - 1
            if place > start:
                return place
    return start


@dataclass(frozen=True)
class CutRule:
    """Where to cut: ``last(text, start, end)`` returns the last place, ``crossed`` matches tokens that cross one."""

    last: Callable[[str, int, int], int]
    crossed: re.Pattern[str]


AT_BLANKS = CutRule(last_blank, re.compile(r"[^ ] |\n.", re.DOTALL))
BETWEEN_WORDS = CutRule(last_word, re.compile(r"\S |\n[\w\ufffd]"))


def cut(text: str, limit: int, rule: CutRule = AT_BLANKS) -> list[str]:
    """Cut a text into pieces of at most ``limit`` characters whose concatenation is the text.

    The cuts are at the rule's places, which no token of a matching vocabulary crosses, so that encoding the pieces one
    by one gives the same ids. If ``limit`` characters contain no such place, the piece has exactly ``limit`` characters.
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        end = rule.last(text, start, start + limit)
        end = end if end > start else start + limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
