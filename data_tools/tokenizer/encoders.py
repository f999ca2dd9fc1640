"""The encoders behind `Tokenizer`, one for each kind of model file."""

from __future__ import annotations

import hashlib
import json

from data_tools.tokenizer.huggingface_encoder import HuggingFaceEncoder
from data_tools.tokenizer.sentencepiece_encoder import SentencePieceEncoder

Encoder = SentencePieceEncoder | HuggingFaceEncoder


def make_encoder(kind: str, model: bytes) -> Encoder:
    """Open the content of a model file; ``kind`` is "sentencepiece" or "huggingface".

    Raises:
        RuntimeError, ValueError: the library cannot load it; the message is the library's.
    """
    return SentencePieceEncoder(model) if kind == "sentencepiece" else HuggingFaceEncoder(model)


def tokenizer_hash(encoder: Encoder, special_ids: dict[str, int]) -> str:
    """A hash that is equal for tokenizers that produce the same ids and have the same bos, eos and pad."""
    if special_ids == encoder.special_ids:
        return encoder.hash
    return hashlib.sha256(
        json.dumps([encoder.hash, *(special_ids[name] for name in ("bos", "eos", "pad"))]).encode()
    ).hexdigest()
