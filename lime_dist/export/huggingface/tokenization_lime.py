"""A sentencepiece model as a `transformers` tokenizer that gives exactly the model's ids.

No text is stripped or added, and text that spells a special token is encoded as ordinary text.
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE_MARK = "\u2581"
"""How sentencepiece writes a space. If a text contains this character, it is encoded as bytes, so that decoding restores it."""


class LimeTokenizer(PreTrainedTokenizer):
    """A tokenizer from ``tokenizer.model``. Needs the package sentencepiece."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, begins_with_bos: bool = False, **kwargs: Any) -> None:
        self.vocab_file, self.begins_with_bos = vocab_file, begins_with_bos
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**{**kwargs, "begins_with_bos": begins_with_bos, "split_special_tokens": True})

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        start = [self.bos_token_id] if self.begins_with_bos else []
        return start + token_ids_0 + (start + token_ids_1 if token_ids_1 else [])

    @property
    def vocab_size(self) -> int:
        return self.pieces.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        tokens: list[str] = []
        mark_pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        if SPACE_MARK in text and all(piece in self.get_vocab() for piece in mark_pieces):
            for i, part in enumerate(text.split(SPACE_MARK)):
                tokens += mark_pieces if i else []
                if part:
                    tokens += (self.middle if tokens else self.pieces).encode(part, out_type=str)
            return tokens
        return self.pieces.encode(text, out_type=str)

    @cached_property
    def middle(self) -> sentencepiece.SentencePieceProcessor:
        """The model without the space that it puts before a text; it encodes the parts after a mark."""
        from sentencepiece import sentencepiece_model_pb2

        model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated on import
        model.ParseFromString(self.pieces.serialized_model_proto())
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text, run = "", list[int]()
        for token in tokens:
            piece = self.pieces.piece_to_id(token)
            if self.pieces.is_control(piece):
                text, run = text + self.pieces.decode(run) + token, []
            else:
                run.append(piece)
        return text + self.pieces.decode(run)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
