"""Encode and decode with a Hugging Face tokenizer: its vocabulary, merges, added tokens and pipeline of components."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.tokenizer.pieces import BETWEEN_WORDS, SPACE_MARK
from lime_dist.errors import LimeError

if TYPE_CHECKING:
    import tokenizers

PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def canonical(source: dict[str, Any], special: dict[str, int]) -> bytes:
    """Return the part of a ``tokenizer.json`` that determines ids, in one layout: equal encoders have equal bytes.

    Truncation, padding, dropout and the post-processor's template are dropped.

    Args:
        special: text and id of tokens to mark as special, so that their text in a document is encoded as ordinary text.

    Raises:
        KeyError, TypeError, ValueError: the file has another structure.
    """
    model = {key: value for key, value in source["model"].items() if value is not None and value is not False}
    model.pop("dropout", None)
    if "merges" in model:  # older versions omit the type and write "a b" for ["a", "b"]
        model.setdefault("type", "BPE")
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = {token["id"]: token for token in source.get("added_tokens") or []}
    for text, number in special.items():
        added[number] = {**PLAIN_TOKEN, **added.get(number, {}), "id": number, "content": text, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added[number] for number in sorted(added)],
        "normalizer": source.get("normalizer"),
        "pre_tokenizer": source.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": source.get("decoder"),
        "model": model,
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def without_prefix(component: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that prepends nothing to a text."""
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Sequence":
        parts = "normalizers" if "normalizers" in component else "pretokenizers"
        return {**component, parts: [part for part in map(without_prefix, component[parts]) if part]}
    if component["type"] == "Metaspace":
        kept = {key: value for key, value in component.items() if key != "add_prefix_space"}  # the older name
        return kept | {"prepend_scheme": "never"}
    return component | {"add_prefix_space": False} if component["type"] == "ByteLevel" else component


def load(data: bytes) -> tokenizers.Tokenizer:
    """Open a tokenizer that encodes the text of special tokens as ordinary text, and uses a single thread.

    Raises:
        ValueError: the data is not a tokenizer.
        LimeError: the package tokenizers is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise LimeError(
            "a Hugging Face tokenizer needs the package tokenizers, which is not installed; pip install 'lime_dist[hf]'"
        ) from None
    # There is a process for each core already: more threads would only compete with the other processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error).partition("\n")[0]) from None
    tokenizer.encode_special_tokens = True
    return tokenizer


class HuggingFaceEncoder:
    """An encoder for `Tokenizer`, from the bytes that `canonical` returns.

    Attributes:
        vocab_size: the highest id + 1, added tokens included.
        model_type: bpe, unigram, …
        hash: SHA-256 of the bytes.
        holes: the number of ids without a token.
        unknown_token: what a lossy model encodes an unknown word as.
        special_ids: all -1, as the file does not say which token is bos, eos or pad.

    Raises:
        ValueError: it cannot be loaded.
    """

    name = "tokenizers"
    cut_rule = BETWEEN_WORDS

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._tokenizer = load(data)
        ids = list(self._tokenizer.get_vocab().values())
        self.vocab_size: int = max(ids, default=-1) + 1
        self.holes = self.vocab_size - len(set(ids))
        if len(set(ids)) < len(ids):
            raise ValueError("two tokens have the same id")
        if self.holes > len(ids):
            raise ValueError(f"its {len(ids)} tokens have ids up to {self.vocab_size - 1}")
        self.model_type = type(self._tokenizer.model).__name__.lower()
        self.hash = hashlib.sha256(data).hexdigest()
        self.special_ids = {"bos": -1, "eos": -1, "pad": -1}
        self.unknown_token: str | None = getattr(self._tokenizer.model, "unk_token", None)
        # Some pipelines prepend a space to a text that begins without one, and remove one when decoding. For them, a
        # text that begins with a space gets a second one, as sentencepiece's own prefix would give it.
        self._doubles_space = (self._round_trip(" a"), self._round_trip("  a")) == ("a", " a")

    def _round_trip(self, text: str) -> str:
        return self.decode(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids int32 [tokens] of each text."""
        if self._doubles_space:
            texts = [" " + text if text.startswith(" ") else text for text in texts]
        return self._ids(self._tokenizer, texts)

    def encode_middle(self, text: str) -> np.ndarray:
        """Ids int32 [tokens] of a text that continues another one: nothing is prepended to it."""
        return self._ids(self._without_prefix, [text])[0]

    @staticmethod
    def _ids(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    @cached_property
    def _without_prefix(self) -> tokenizers.Tokenizer:
        content = json.loads(self._data)
        changed = {part: without_prefix(content[part]) for part in ("normalizer", "pre_tokenizer")}
        if all(changed[part] == content[part] for part in changed):
            return self._tokenizer
        return load(json.dumps(content | changed).encode())

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens and ids without a token decode to nothing."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None if it is not in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def special_tokens(self) -> dict[str, int]:
        """The special tokens, which no text may become, with their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {added[number].content: number for number in sorted(added) if added[number].special}

    def whole_tokens(self) -> list[str]:
        """Special tokens, and tokens that are split off a text before it is encoded."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def token_texts(self) -> Iterator[str]:
        """The text of each token that a text can be encoded with; U+FFFD stands for incomplete characters."""
        import tokenizers

        bytes_decoder = tokenizers.decoders.ByteLevel()
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self._data)["decoder"])
        special = self.special_tokens()
        for token in self._tokenizer.get_vocab():
            if token not in special:
                yield bytes_decoder.decode([token]) if is_byte_level else token.replace(SPACE_MARK, " ")
