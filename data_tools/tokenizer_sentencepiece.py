"""Encode and decode with a sentencepiece model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_tools.tokenizer_pieces import AT_BLANKS

SPACE_MARK = "\u2581"  # sentencepiece's stand-in for a space; in a text of its own it would come back as a space
MODEL: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # made when it is imported
PIECE_TYPE = MODEL.SentencePiece


def piece_hash(model: sentencepiece.SentencePieceProcessor) -> str:
    """SHA-256 of the list of pieces, their scores and types: equal for models that encode alike, unlike their files."""
    digest = hashlib.sha256()
    for i in range(model.vocab_size()):
        kinds = (model.is_unknown(i), model.is_control(i), model.is_byte(i), model.is_unused(i))
        digest.update(json.dumps([model.id_to_piece(i), model.get_score(i), *kinds]).encode() + b"\n")
    return digest.hexdigest()


def parse_model(data: bytes) -> Any:
    """The content of a model file, to be changed or looked at."""
    content = MODEL()
    content.ParseFromString(data)
    return content


def with_control_symbols(data: bytes, ids: set[int]) -> bytes:
    """The model with these pieces as control symbols, which no text becomes; its own bytes if they are so already."""
    content, changed = parse_model(data), False
    for number in ids:
        piece = content.pieces[number]
        if piece.type not in (PIECE_TYPE.CONTROL, PIECE_TYPE.UNKNOWN):
            piece.type, changed = PIECE_TYPE.CONTROL, True
    return content.SerializeToString() if changed else data


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
        self._content = parse_model(data)
        self.vocab_size: int = self._model.vocab_size()
        types = self._content.trainer_spec.ModelType.Name(self._content.trainer_spec.model_type)
        self.model_type = types.lower()
        self.unknown_token: str | None = self._model.id_to_piece(self._model.unk_id())
        self.special_ids = {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "pad": self._model.pad_id()}

    @cached_property
    def hash(self) -> str:
        """Equal for models that encode alike. That of the pieces alone for those that change nothing in a text."""
        changes, trainer = self._content.normalizer_spec, self._content.trainer_spec
        what = [
            hashlib.sha256(changes.precompiled_charsmap).hexdigest(),
            changes.add_dummy_prefix,
            changes.remove_extra_whitespaces,
            changes.escape_whitespaces,
            trainer.treat_whitespace_as_suffix,
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
        if not self._content.normalizer_spec.add_dummy_prefix:
            return self._model
        changed = MODEL()
        changed.CopyFrom(self._content)
        changed.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=changed.SerializeToString())

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
        apart = (PIECE_TYPE.CONTROL, PIECE_TYPE.USER_DEFINED)
        return [piece.piece for piece in self._content.pieces if piece.type in apart]

    def token_texts(self) -> Iterator[str]:
        """What each piece that a text can be encoded with stands for, those for bytes left out."""
        for piece in self._content.pieces:
            if piece.type not in (PIECE_TYPE.CONTROL, PIECE_TYPE.UNKNOWN, PIECE_TYPE.BYTE):
                yield piece.piece.replace(SPACE_MARK, " ")
