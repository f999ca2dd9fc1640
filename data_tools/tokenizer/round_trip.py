"""Find texts that encoding and decoding changes, and define the texts that every tokenizer is checked with."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.tokenizer.pieces import SPACE_MARK
from data_tools.tokenizer.tokenizer import Tokenizer

# EVERY_BYTE contains every byte that can occur in UTF-8. A vocabulary that lacks one of them loses characters.
FIRST_BYTES = [*(bytes([lead, 0x80]) for lead in range(0xC3, 0xE0)), b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"]
FIRST_BYTES += [bytes([lead, 0x80, 0x80]) for lead in range(0xE1, 0xF0)]
FIRST_BYTES += [bytes([lead, 0x80, 0x80, 0x80]) for lead in range(0xF1, 0xF5)]
EVERY_BYTE = "".join(map(chr, range(0x80))) + b"".join(FIRST_BYTES).decode() + "".join(map(chr, range(0x80, 0xC0)))
HARD_TEXTS = [
    "",
    " ",
    "  two  spaces, trailing  ",
    " one space before, one after ",
    "\n\n\ttab\r\nline feed\n",
    "\0\x01\x1f\x7f\u0085\u00a0\u200b\u2028\u3000\ufeff",
    "UPPER Case İß, ﬁ ① ｆｕｌｌ width, é, e\u0301",
    "a . b , c ! It do n't , we 'll ; ( d )",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈, 漢字かな한글, العربية, \U0010ffff",
    f"<s></s><pad><unk><0x41> {SPACE_MARK}lower{SPACE_MARK * 3} {SPACE_MARK} \u2047\ufffd",
    f"{SPACE_MARK} first",
    EVERY_BYTE,
    "x" * 5000,
    "1234567890 3.14 " * 300,
]


def failures(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (text, decoded text) of each text that encoding and decoding changes."""
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        decoded = tokenizer.decode(ids)
        if decoded != text:
            yield text, decoded


def first_failure(tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """Return the first text that encoding and decoding changes, or None."""
    return next((text for text, _ in failures(tokenizer, texts)), None)
