"""A tokenizer is a folder: a sentencepiece model, its facts, and hashes that are checked whenever it is opened."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_tools.common import command_parser
from lime_dist.data.files import json_bytes, read_json, sha256_file, sync_folder, write_atomic
from lime_dist.errors import LimeError, run_command

FORMAT = "lime_dist tokenizer 1"
MODEL_FILE, FACTS_FILE = "tokenizer.model", "tokenizer.json"
SPACE_MARK = "\u2581"  # sentencepiece's stand-in for a space; in a text of its own it would come back as a space
PIECE_CHARACTERS = 1 << 20
REWRITE = "train the tokenizer again or copy the folder again"


def cut(text: str, limit: int) -> list[str]:
    """Cut a text into pieces of at most ``limit`` characters whose concatenation is the text.

    A cut comes after a newline, else before a space: no token crosses either, so encoding the pieces one by one gives
    the same ids. Only where ``limit`` characters have neither does the cut fall anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        if end <= start:
            end = text.rfind(" ", start + 1, start + limit)
            while end > start and text[end - 1] == " ":
                end -= 1  # to the beginning of a run of spaces, which may be one token
        end = end if end > start else start + limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def piece_hash(model: sentencepiece.SentencePieceProcessor) -> str:
    """SHA-256 of the list of pieces, their scores and types: equal for models that encode alike, unlike their files."""
    digest = hashlib.sha256()
    for i in range(model.vocab_size()):
        kinds = (model.is_unknown(i), model.is_control(i), model.is_byte(i), model.is_unused(i))
        digest.update(json.dumps([model.id_to_piece(i), model.get_score(i), *kinds]).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_facts(model: sentencepiece.SentencePieceProcessor, model_type: str, training: dict[str, Any]) -> bytes:
    """The content of ``tokenizer.json`` for a model."""
    facts = {
        "format": FORMAT,
        "model_type": model_type,
        "vocab_size": model.vocab_size(),
        "unk_id": model.unk_id(),
        "bos_id": model.bos_id(),
        "eos_id": model.eos_id(),
        "pad_id": model.pad_id(),
        "hash": piece_hash(model),
        "model_sha256": hashlib.sha256(model.serialized_model_proto()).hexdigest(),
        "training": training,
    }
    return json_bytes(facts)


class Tokenizer:
    """Text to ids and back, exactly. Opening checks the model file and its pieces against the facts (LimeError).

    Attributes: ``vocab_size``, ``bos_id``, ``eos_id``, ``pad_id``, ``hash`` (of the pieces), ``facts``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        hint = "give the --output of data_tools.tokenizer"
        self.facts = read_json(self.folder / FACTS_FILE, hint)
        if self.facts.get("format") != FORMAT:
            raise LimeError(f"{self.folder / FACTS_FILE}: no tokenizer of this program; {hint}")
        model_path = self.folder / MODEL_FILE
        if not model_path.is_file():
            raise LimeError(f"{model_path}: missing, though {FACTS_FILE} is there; {REWRITE}")
        if sha256_file(model_path) != self.facts["model_sha256"]:
            raise LimeError(f"{model_path}: its content differs from the hash in {FACTS_FILE}; {REWRITE}")
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
        if piece_hash(self._model) != self.facts["hash"] or self._model.vocab_size() != self.facts["vocab_size"]:
            raise LimeError(f"{model_path}: its pieces differ from the hash in {FACTS_FILE}; {REWRITE}")
        self.vocab_size: int = self.facts["vocab_size"]
        self.bos_id: int = self.facts["bos_id"]
        self.eos_id: int = self.facts["eos_id"]
        self.pad_id: int = self.facts["pad_id"]
        self.hash: str = self.facts["hash"]
        mark_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = np.asarray(mark_ids, dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 [tokens] of a text, without bos or eos. A text with lone surrogates raises UnicodeEncodeError."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of several texts, one array each; about twice as fast as one by one. 64 texts a call are enough."""
        plain = [text for text in texts if self._is_plain(text)]
        ids = iter(self._model.encode(plain, return_type="numpy", num_threads=1) if plain else [])
        return [next(ids) if self._is_plain(text) else self._encode_in_pieces(text) for text in texts]

    @staticmethod
    def _is_plain(text: str) -> bool:
        return len(text) <= PIECE_CHARACTERS and SPACE_MARK not in text

    def _encode_in_pieces(self, text: str) -> np.ndarray:
        parts: list[np.ndarray] = []
        for i, between in enumerate(text.split(SPACE_MARK)):
            if i:
                parts.append(self._mark_ids)  # spelt in bytes, which decode to themselves
            parts += [
                self._model.encode(piece, return_type="numpy") for piece in cut(between, PIECE_CHARACTERS) if piece
            ]
        return np.concatenate(parts)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of ids; bos, eos and pad give nothing. LimeError for an id outside the vocabulary."""
        array = np.asarray(ids)
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            raise LimeError(
                f"token ids {array.min()}..{array.max()} are outside the vocabulary of {self.vocab_size} in "
                f"{self.folder}; use the tokenizer that made them"
            )
        return self._model.decode(array.tolist())

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's two files, facts last."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (MODEL_FILE, FACTS_FILE):
            write_atomic(folder / name, (self.folder / name).read_bytes())


def first_failure(tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """The first text that does not come back from encoding and decoding, or None."""
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokenizer.decode(ids) != text:
            return text
    return None


def replace_folder(new: Path, folder: Path) -> None:
    """Move a finished tokenizer's files from ``new`` to their place, facts last, and remove ``new``."""
    (folder / FACTS_FILE).unlink(missing_ok=True)
    for name in (MODEL_FILE, FACTS_FILE):
        (new / name).replace(folder / name)
    sync_folder(folder)
    shutil.rmtree(new)


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.tokenizer train``."""
    from data_tools import tokenizer_training

    parser = command_parser(
        "tokenizer",
        "Train a sentencepiece tokenizer that gives every text back exactly.",
        "python -m data_tools.tokenizer train --input data/embedded --output data/tokenizer --vocab-size 4096",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizer_training.add_arguments(commands)
    tokenizer_training.run(parser.parse_args(arguments))


if __name__ == "__main__":
    run_command(main)
