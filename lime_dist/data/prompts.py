"""Beginnings of texts that the model continues during training: ``monitor.samples``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lime_dist.config.schema import SampleTextsConfig
from lime_dist.errors import LimeError


@dataclass(frozen=True)
class Prompts:
    """Prompts as text and as token ids.

    Attributes:
        texts: by prompt.
        tokens: of each prompt, with the token that begins a document.
        eos: the token that ends a continuation.
        vocab_size: tokens that ``decode`` knows. The model may have more; they are never chosen.
        decode: text of token ids; called on rank 0 only.
    """

    texts: Sequence[str]
    tokens: Sequence[Sequence[int]]
    eos: int
    vocab_size: int
    decode: Callable[[list[int]], str]

    def check_length(self, settings: SampleTextsConfig, sequence_length: int) -> None:
        """
        Raises:
            LimeError: a prompt and its continuation are longer than a sample.
        """
        longest = max(map(len, self.tokens))
        if longest + settings.tokens > sequence_length:
            raise LimeError(
                f"monitor.samples: a prompt of {longest} tokens and monitor.samples.tokens={settings.tokens} are more than "
                f"data.sequence_length={sequence_length}; shorten either"
            )
