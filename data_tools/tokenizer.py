"""A tokenizer is a folder: a sentencepiece or Hugging Face model, its facts, and hashes that are checked when opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import command_parser
from data_tools.tokenizer_huggingface import HuggingFaceEncoder
from data_tools.tokenizer_pieces import cut
from data_tools.tokenizer_sentencepiece import SPACE_MARK, SentencePieceEncoder
from lime_dist.data.files import read_json, write_atomic
from lime_dist.errors import LimeError, run_command

FORMAT = "lime_dist tokenizer 1"
FACTS_FILE = "tokenizer.json"
# The kinds of model, each with the file that holds it. Hugging Face's own name for it is that of the facts.
MODEL_FILES = {"sentencepiece": "tokenizer.model", "huggingface": "huggingface.json"}
# What a tokenizer cannot be opened without, with its type.
FACTS = {
    "kind": str,
    "model_sha256": str,
    "hash": str,
    "exact": bool,
    "cuttable": bool,
    "vocab_size": int,
} | dict.fromkeys(("bos_id", "eos_id", "pad_id"), int)
# What folders from before there was an import, trained all of them, do not say.
EARLIER_FACTS: dict[str, Any] = {"kind": "sentencepiece", "exact": True, "cuttable": True}
PIECE_CHARACTERS = 1 << 20
REWRITE = "train or import the tokenizer again, or copy the folder again"

Encoder = SentencePieceEncoder | HuggingFaceEncoder


def make_encoder(kind: str, model: bytes) -> Encoder:
    """The encoder of a model file's content. RuntimeError or ValueError, in the library's words, if it is no model."""
    return SentencePieceEncoder(model) if kind == "sentencepiece" else HuggingFaceEncoder(model)


def tokenizer_hash(encoder: Encoder, special_ids: dict[str, int]) -> str:
    """Equal for tokenizers that encode alike and begin and end documents alike."""
    if special_ids == encoder.special_ids:
        return encoder.hash
    return hashlib.sha256(
        json.dumps([encoder.hash, *(special_ids[name] for name in ("bos", "eos", "pad"))]).encode()
    ).hexdigest()


class Tokenizer:
    """Text to ids and back. Opening checks the model file and its content against the facts (LimeError).

    Attributes: ``vocab_size`` (highest id + 1), ``eos_id``, ``bos_id`` and ``pad_id`` (-1: there is none), ``hash`` (of
    what decides over ids), ``exact`` (False: imported though some texts do not come back from it), ``facts``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        hint = "give the --output of data_tools.tokenizer"
        facts_path = self.folder / FACTS_FILE
        self.facts = read_json(facts_path, hint)
        if self.facts.get("format") != FORMAT:
            raise LimeError(f"{facts_path}: no tokenizer of this program; {hint}")
        self.facts = EARLIER_FACTS | self.facts
        missing = [name for name in FACTS if not isinstance(self.facts.get(name), FACTS[name])]
        if missing or self.facts["kind"] not in MODEL_FILES:
            raise LimeError(f"{facts_path}: damaged, {missing[0] if missing else 'kind'} is not as written; {REWRITE}")
        model_path = self.folder / MODEL_FILES[self.facts["kind"]]
        if not model_path.is_file():
            raise LimeError(f"{model_path}: missing, though {FACTS_FILE} is there; {REWRITE}")
        model = model_path.read_bytes()
        if hashlib.sha256(model).hexdigest() != self.facts["model_sha256"]:
            raise LimeError(f"{model_path}: its content differs from the hash in {FACTS_FILE}; {REWRITE}")
        try:
            self._encoder = make_encoder(self.facts["kind"], model)
        except (RuntimeError, ValueError) as error:
            raise LimeError(f"{model_path}: cannot be opened ({error}); {REWRITE}") from None
        self.vocab_size: int = self._encoder.vocab_size
        special_ids = {name: self.facts[f"{name}_id"] for name in ("bos", "eos", "pad")}
        self.hash = tokenizer_hash(self._encoder, special_ids)
        if self.hash != self.facts["hash"] or self.vocab_size != self.facts["vocab_size"]:
            raise LimeError(f"{model_path}: its pieces differ from the hash in {FACTS_FILE}; {REWRITE}")
        self.bos_id, self.eos_id, self.pad_id = special_ids.values()
        self._special_ids = list(special_ids.values())
        self.exact: bool = self.facts["exact"]
        self._cut_rule = self._encoder.cut_rule if self.facts["cuttable"] else None
        self._mark_ids = self._spelt_mark()

    def _spelt_mark(self) -> np.ndarray | None:
        """A space mark in bytes, which decode to themselves; None if it comes back by itself, or there are no bytes."""
        ids = [self._encoder.token_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        known = [number for number in ids if number is not None]
        plain = self._encoder.decode(self._encoder.encode_batch([f"a{SPACE_MARK}"])[0].tolist())
        if len(known) < len(ids) or plain == f"a{SPACE_MARK}":
            return None
        return np.asarray(known, dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 [tokens] of a text, without bos or eos. A text with lone surrogates raises UnicodeEncodeError."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of several texts, one array each; about twice as fast as one by one. 64 texts a call are enough.

        The text of a special token becomes ordinary ids. Texts over ``PIECE_CHARACTERS`` are encoded in pieces, with
        the ids of the whole as long as each piece has a place to cut (``tokenizer_pieces``; unigram models: up to the
        order inside runs like spaces, which rounding decides). They come back either way.
        """
        plain = [text for text in texts if self._is_plain(text)]
        try:
            ids = iter(self._encoder.encode_batch(plain) if plain else [])
            return [next(ids) if self._is_plain(text) else self.encode_in_pieces(text) for text in texts]
        except TypeError:  # all that the libraries say of a lone surrogate
            "".join(texts).encode()
            raise

    def _is_plain(self, text: str) -> bool:
        return len(text) <= PIECE_CHARACTERS and (SPACE_MARK not in text or self._mark_ids is None)

    def encode_in_pieces(self, text: str, limit: int | None = None) -> np.ndarray:
        """Ids of a text that is cut every ``limit`` characters (default: PIECE_CHARACTERS) and at space marks."""
        parts: list[np.ndarray] = []
        for i, between in enumerate([text] if self._mark_ids is None else text.split(SPACE_MARK)):
            if i and self._mark_ids is not None:
                parts.append(self._mark_ids)
            rule = self._cut_rule
            for piece in cut(between, limit or PIECE_CHARACTERS, rule) if rule else [between]:
                if piece:
                    parts.append(
                        self._encoder.encode_middle(piece) if parts else self._encoder.encode_batch([piece])[0]
                    )
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of ids; bos, eos and pad give nothing. LimeError for an id outside the vocabulary."""
        array = np.asarray(ids)
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            raise LimeError(
                f"token ids {array.min()}..{array.max()} are outside the vocabulary of {self.vocab_size} in "
                f"{self.folder}; use the tokenizer that made them"
            )
        return self._encoder.decode(array[~np.isin(array, self._special_ids)].tolist())

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's two files, facts last."""
        folder.mkdir(parents=True, exist_ok=True)
        mine = MODEL_FILES[self.facts["kind"]]
        for name in (mine, FACTS_FILE):
            write_atomic(folder / name, (self.folder / name).read_bytes())
        for name in set(MODEL_FILES.values()) - {mine}:
            (folder / name).unlink(missing_ok=True)


def failures(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[str, str]]:
    """The texts that do not come back from encoding and decoding, each with what came back."""
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        back = tokenizer.decode(ids)
        if back != text:
            yield text, back


def first_failure(tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """The first text that does not come back from encoding and decoding, or None."""
    return next((text for text, _ in failures(tokenizer, texts)), None)


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.tokenizer train`` and ``import``."""
    from data_tools import tokenizer_import, tokenizer_training

    parser = command_parser(
        "tokenizer",
        "Train a sentencepiece tokenizer that gives every text back exactly, or import one that exists.\n"
        "Each command has its own --help.",
        "python -m data_tools.tokenizer train --input data/embedded --output data/tokenizer --vocab-size 4096\n"
        "  python -m data_tools.tokenizer import --model gpt2/tokenizer.json --output data/tokenizer",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizer_training.add_arguments(commands)
    tokenizer_import.add_arguments(commands)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    run_command(main)
