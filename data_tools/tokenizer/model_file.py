"""Read and change parts of a sentencepiece model file that its library does not expose, in protobuf's wire format.

The protobuf classes that sentencepiece ships load only with the protobuf version that generated them, or a newer one.
A message is a sequence of fields: a number and a wire type, then an integer, four or eight bytes, or a string with its
length. Field numbers and defaults are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

INTEGER, EIGHT_BYTES, STRING, FOUR_BYTES = 0, 1, 2, 5  # wire types
SIZES = {EIGHT_BYTES: 8, FOUR_BYTES: 4}  # of the values of a wire type
PIECE, TRAINER, NORMALIZER = 1, 2, 3  # fields of a model
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3  # fields of a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of a piece
MODEL_TYPE, SPACE_AS_SUFFIX = 3, 24  # fields of the trainer's settings
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5  # fields of the normalizer's settings


@dataclass(frozen=True)
class Settings:
    """How a model changes a text before splitting it into pieces, and its type."""

    model_type: str
    character_map: bytes  # empty: no character is changed
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    treat_whitespace_as_suffix: bool


def _integer(data: bytes, place: int) -> tuple[int, int]:
    """(value, the place after it): seven bits per byte, lowest first; the eighth bit says that more bytes follow."""
    value = shift = 0
    while True:
        value |= (data[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if data[place - 1] < 0x80:
            return value, place


def _encode_integer(value: int) -> bytes:
    low = bytearray()
    while value > 0x7F:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*low, value])


class Field(NamedTuple):
    """One field of a message: its value is ``integer`` or ``content``, by its wire type; ``encoded`` is all of it."""

    number: int
    integer: int
    content: bytes
    encoded: bytes


def read_fields(message: bytes) -> Iterator[Field]:
    """Yield the fields of a message, in order."""
    place = 0
    while place < len(message):
        start, key, place = place, message[place], place + 1
        if key > 0x7F:  # rarely: a field number above 15
            key, place = _integer(message, start)
        if key & 7 == INTEGER:
            value, place = _integer(message, place)
            yield Field(key >> 3, value, b"", message[start:place])
            continue
        size = SIZES.get(key & 7)
        if size is None:
            size, place = message[place], place + 1
            if size > 0x7F:
                size, place = _integer(message, place - 1)
        place += size
        yield Field(key >> 3, 0, message[place - size : place], message[start:place])


def _integer_of(message: bytes, number: int, default: int) -> int:
    """The value of an integer field; if it is repeated, the last one counts."""
    return ([default] + [field.integer for field in read_fields(message) if field.number == number])[-1]


def _content_of(message: bytes, number: int) -> bytes:
    """The value of a string or message field; if it is repeated, the last one counts."""
    return ([b""] + [field.content for field in read_fields(message) if field.number == number])[-1]


def _with_integer(message: bytes, number: int, value: int) -> bytes:
    """Return the message with an integer field set."""
    kept = b"".join(field.encoded for field in read_fields(message) if field.number != number)
    return kept + _encode_integer(number << 3 | INTEGER) + _encode_integer(value)


def _string_field(number: int, content: bytes) -> bytes:
    return _encode_integer(number << 3 | STRING) + _encode_integer(len(content)) + content


def read_settings(model: bytes) -> Settings:
    """Read the settings from the content of a model file."""
    parts = {field.number: field.content for field in read_fields(model) if field.number in (TRAINER, NORMALIZER)}
    trainer, normalizer = parts.get(TRAINER, b""), parts.get(NORMALIZER, b"")
    return Settings(
        model_type=MODEL_TYPES.get(_integer_of(trainer, MODEL_TYPE, 1), "unknown"),
        character_map=_content_of(normalizer, CHARACTER_MAP),
        add_dummy_prefix=bool(_integer_of(normalizer, DUMMY_PREFIX, 1)),
        remove_extra_whitespaces=bool(_integer_of(normalizer, REMOVE_SPACES, 1)),
        escape_whitespaces=bool(_integer_of(normalizer, ESCAPE_SPACES, 1)),
        treat_whitespace_as_suffix=bool(_integer_of(trainer, SPACE_AS_SUFFIX, 0)),
    )


class Piece(NamedTuple):
    """One piece of a model; of two merges, byte-pair models make the one with the higher ``score`` first."""

    text: str
    type: int
    score: float


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces, by id."""
    return [_piece(field.content) for field in read_fields(model) if field.number == PIECE]


def _piece(message: bytes) -> Piece:
    text, kind, score = b"", NORMAL, b"\0\0\0\0"
    for field in read_fields(message):
        if field.number == PIECE_TEXT:
            text = field.content
        elif field.number == PIECE_SCORE:
            score = field.content
        elif field.number == PIECE_TYPE:
            kind = field.integer
    return Piece(text.decode(), kind, struct.unpack("<f", score)[0])


def without_dummy_prefix(model: bytes) -> bytes:
    """Return the model changed so that it prepends nothing to a text."""
    return b"".join(
        _string_field(NORMALIZER, _with_integer(field.content, DUMMY_PREFIX, 0))
        if field.number == NORMALIZER
        else field.encoded
        for field in read_fields(model)
    )


def with_control_symbols(model: bytes, ids: set[int]) -> bytes:
    """Return the model with these pieces made control symbols, which no text becomes; unchanged if they are already."""
    fields, piece_id = [], 0
    for field in read_fields(model):
        encoded = field.encoded
        if field.number == PIECE:
            if piece_id in ids and _integer_of(field.content, PIECE_TYPE, NORMAL) not in (CONTROL, UNKNOWN):
                encoded = _string_field(PIECE, _with_integer(field.content, PIECE_TYPE, CONTROL))
            piece_id += 1
        fields.append(encoded)
    return b"".join(fields)
