"""Encode and decode with a sentencepiece model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import sentencepiece

from data_tools.tokenizer.model_file import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    read_pieces,
    read_settings,
    without_dummy_prefix,
)
from data_tools.tokenizer.pieces import AT_BLANKS, SPACE_MARK


def piece_hash(model: sentencepiece.SentencePieceProcessor) -> str:
    """SHA-256 of the pieces with their scores and types: equal for models that encode alike, even if their files differ."""
    digest, ids = hashlib.sha256(), list(range(model.vocab_size()))
    kinds = (model.is_unknown(ids), model.is_control(ids), model.is_byte(ids), model.is_unused(ids))
    encode = json.JSONEncoder().encode
    for piece in zip(model.id_to_piece(ids), model.get_score(ids), *kinds, strict=True):
        digest.update(encode(piece).encode() + b"\n")
    return digest.hexdigest()


class SentencePieceEncoder:
    """An encoder for `Tokenizer`, from the content of a model file.

    Attributes:
        data: the content of the model file.
        vocab_size: the number of pieces.
        model_type: bpe, unigram, …
        unknown_token: the piece for unknown text.
        special_ids: the model's own bos, eos and pad, -1 for none.

    Raises:
        RuntimeError: the content is not a model.
    """

    name = "sentencepiece"
    cut_rule = AT_BLANKS
    holes = 0  # ids without a token

    def __init__(self, data: bytes) -> None:
        if not data:
            raise RuntimeError("the file is empty")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.data, self._settings = data, read_settings(data)
        self.vocab_size: int = self._model.vocab_size()
        self.model_type = self._settings.model_type
        self.unknown_token: str | None = self._model.id_to_piece(self._model.unk_id())
        self.special_ids = {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "pad": self._model.pad_id()}

    @cached_property
    def hash(self) -> str:
        """A hash of the pieces and of the normalisation; `piece_hash` alone if the model does not normalise text."""
        settings = self._settings
        normalization = [
            hashlib.sha256(settings.character_map).hexdigest(),
            settings.add_dummy_prefix,
            settings.remove_extra_whitespaces,
            settings.escape_whitespaces,
            settings.treat_whitespace_as_suffix,
        ]
        pieces = piece_hash(self._model)
        if normalization == [hashlib.sha256(b"").hexdigest(), False, False, True, False]:
            return pieces
        return hashlib.sha256(json.dumps([pieces, *normalization]).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids int32 [tokens] of each text."""
        return self._model.encode(texts, return_type="numpy", num_threads=1)

    def encode_middle(self, text: str) -> np.ndarray:
        """Ids int32 [tokens] of a text that continues another one: nothing is prepended to it."""
        return self._without_prefix.encode(text, return_type="numpy")

    @cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        if not self._settings.add_dummy_prefix:
            return self._model
        return sentencepiece.SentencePieceProcessor(model_proto=without_dummy_prefix(self.data))

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control symbols decode to nothing."""
        return self._model.decode(ids)

    def token_id(self, token: str) -> int | None:
        """The id of a piece, or None if it is not in the vocabulary."""
        number = self._model.piece_to_id(token)
        return number if self._model.id_to_piece(number) == token else None

    def special_tokens(self) -> dict[str, int]:
        """The control symbols, which no text may become, with their ids."""
        return {self._model.id_to_piece(i): i for i in range(self.vocab_size) if self._model.is_control(i)}

    def whole_tokens(self) -> list[str]:
        """Control symbols, and user-defined symbols, which are split off a text before it is encoded."""
        return [piece.text for piece in read_pieces(self.data) if piece.type in (CONTROL, USER_DEFINED)]

    def token_texts(self) -> Iterator[str]:
        """The text of each piece that a text can be encoded with, except those for single bytes."""
        for piece in read_pieces(self.data):
            if piece.type not in (CONTROL, UNKNOWN, BYTE):
                yield piece.text.replace(SPACE_MARK, " ")
