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
    """SHA-256 of the list of pieces, their scores and types: equal for models that encode alike, unlike their files."""
    digest = hashlib.sha256()
    for i in range(model.vocab_size()):
        kinds = (model.is_unknown(i), model.is_control(i), model.is_byte(i), model.is_unused(i))
        digest.update(json.dumps([model.id_to_piece(i), model.get_score(i), *kinds]).encode() + b"\n")
    return digest.hexdigest()


class SentencePieceEncoder:
    """One of the two encoders behind ``Tokenizer``, from a model file's content; RuntimeError if it is no model.

    Attributes: ``vocab_size``, ``model_type`` (bpe, unigram, …), ``hash`` (of the pieces and of what is done to a text
    before), ``unknown_token``, ``special_ids`` (what each bos, eos and pad is in the model itself, -1 for none).
    """

    cut_rule = AT_BLANKS
    holes = 0  # ids without a token

    def __init__(self, data: bytes) -> None:
        if not data:
            raise RuntimeError("the file is empty")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self._data, self._settings = data, read_settings(data)
        self.vocab_size: int = self._model.vocab_size()
        self.model_type = self._settings.model_type
        self.unknown_token: str | None = self._model.id_to_piece(self._model.unk_id())
        self.special_ids = {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "pad": self._model.pad_id()}

    @cached_property
    def hash(self) -> str:
        """Equal for models that encode alike. That of the pieces alone for those that change nothing in a text."""
        settings = self._settings
        what = [
            hashlib.sha256(settings.character_map).hexdigest(),
            settings.add_dummy_prefix,
            settings.remove_extra_whitespaces,
            settings.escape_whitespaces,
            settings.treat_whitespace_as_suffix,
        ]
        pieces = piece_hash(self._model)
        if what == [hashlib.sha256(b"").hexdigest(), False, False, True, False]:
            return pieces
        return hashlib.sha256(json.dumps([pieces, *what]).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids int32 of whole texts."""
        return self._model.encode(texts, return_type="numpy", num_threads=1)

    def encode_middle(self, text: str) -> np.ndarray:
        """Ids int32 of a text that is the continuation of another: nothing is put before it."""
        return self._without_prefix.encode(text, return_type="numpy")

    @cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        if not self._settings.add_dummy_prefix:
            return self._model
        return sentencepiece.SentencePieceProcessor(model_proto=without_dummy_prefix(self._data))

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control symbols give nothing."""
        return self._model.decode(ids)

    def token_id(self, token: str) -> int | None:
        """The id of a piece."""
        number = self._model.piece_to_id(token)
        return number if self._model.id_to_piece(number) == token else None

    def special_tokens(self) -> dict[str, int]:
        """The symbols that no text must become, with their ids."""
        return {self._model.id_to_piece(i): i for i in range(self.vocab_size) if self._model.is_control(i)}

    def whole_tokens(self) -> list[str]:
        """Control symbols, and symbols that are taken out of a text before it is encoded."""
        return [piece for piece, kind in read_pieces(self._data) if kind in (CONTROL, USER_DEFINED)]

    def token_texts(self) -> Iterator[str]:
        """What each piece that a text can be encoded with stands for, those for bytes left out."""
        for piece, kind in read_pieces(self._data):
            if kind not in (CONTROL, UNKNOWN, BYTE):
                yield piece.replace(SPACE_MARK, " ")
