"""Encode with gigatoken what a sentencepiece BPE model encodes, with the same ids and many times as fast."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from data_tools.tokenizer.model_file import (
    BYTE,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    read_pieces,
    read_settings,
)
from data_tools.tokenizer.pieces import SPACE_MARK
from data_tools.tokenizer.sentencepiece_encoder import SentencePieceEncoder

if TYPE_CHECKING:
    import gigatoken

MOST_GROWTH = 256 << 20
"""gigatoken remembers every word that it has seen, about four bytes for each byte of text that it has not. When its process has
grown by this many bytes, it starts again with nothing remembered."""

CALLS_PER_LOOK = 16  # calls of `GigatokenEncoder.encode_batch` between two looks at the memory
SWITCHES = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


class UnusableError(Exception):
    """gigatoken is not installed, or cannot encode as this model does; the message says which."""


def gigatoken_model(data: bytes) -> str:
    """Convert a sentencepiece model to what gigatoken reads, Hugging Face's JSON.

    No text of a document becomes a control symbol, the unknown piece or a piece for a byte, as in sentencepiece: none of them is
    an added token or the result of a merge. Merges are ranked by the score of their result, as in sentencepiece.

    Raises:
        UnusableError: gigatoken cannot encode as the model does.
    """
    settings, pieces = read_settings(data), read_pieces(data)
    if settings.model_type != "bpe":
        raise UnusableError(f"it cannot encode with {settings.model_type} models")
    if not any(piece.type == BYTE for piece in pieces):
        raise UnusableError("it needs a model with byte fallback")
    if (
        settings.character_map
        or settings.remove_extra_whitespaces
        or not settings.escape_whitespaces
        or settings.treat_whitespace_as_suffix
        or any(piece.type == UNUSED for piece in pieces)
    ):
        raise UnusableError("it cannot change texts as this model does")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prefix = [{"type": "Prepend", "prepend": SPACE_MARK}] if settings.add_dummy_prefix else []
    whole = [(number, piece.text) for number, piece in enumerate(pieces) if piece.type == USER_DEFINED]
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": text, **SWITCHES} for number, text in whole],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "model": {
            "type": "BPE",
            "unk_token": next((piece.text for piece in pieces if piece.type == UNKNOWN), None),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece.text: number for number, piece in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }
    return json.dumps(content, ensure_ascii=False)


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, those with the highest score first."""
    scores = {piece.text: piece.score for piece in pieces if piece.type == NORMAL}
    return [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=lambda text: -scores[text])
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in scores and text[cut:] in scores
    ]


class GigatokenEncoder(SentencePieceEncoder):
    """An encoder for `Tokenizer` that differs from its base in speed alone.

    Args:
        data: the content of a model file.
        converted: what `gigatoken_model` returns for it; None: it is computed.

    Raises:
        UnusableError: gigatoken is not installed, or cannot encode as this model does.
    """

    name = "gigatoken"

    def __init__(self, data: bytes, converted: str | None = None) -> None:
        try:
            import gigatoken
        except ImportError:
            raise UnusableError("it is not installed; pip install 'lime_dist[fast]'") from None
        super().__init__(data)
        self.converted = converted or gigatoken_model(data)
        self._process, self._calls = psutil.Process(), 0
        self._open: type[gigatoken.Tokenizer] = gigatoken.Tokenizer
        self._start()

    def _start(self) -> None:
        self._fast: Any = None  # freed before there is another
        self._fast = self._open.from_json(self.converted).backend
        self._size = self._process.memory_info().rss

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids int32 [tokens] of each text."""
        self._calls += 1
        if self._calls % CALLS_PER_LOOK == 0 and self._process.memory_info().rss > self._size + MOST_GROWTH:
            self._start()
        # Not its own encode_batch: one by one, texts are encoded twice as fast. Bytes that are no UTF-8 would end the process;
        # the text of a str is always UTF-8.
        return [self._fast.encode(text).view(np.int32) for text in texts]

    def encode_middle(self, text: str) -> np.ndarray:
        """Ids int32 [tokens] of a text that continues another one."""
        return super().encode_middle(text) if self._settings.add_dummy_prefix else self.encode_batch([text])[0]
