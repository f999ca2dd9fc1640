"""Choose the library that encodes, and compare its ids with sentencepiece's before anything is written."""

from __future__ import annotations

from data_tools.tokenizer.gigatoken_encoder import UnusableError
from data_tools.tokenizer.round_trip import HARD_TEXTS
from data_tools.tokenizer.tokenizer import Tokenizer
from lime_dist.errors import LimeError

ENCODERS = ("auto", "sentencepiece", "gigatoken")
ENCODER_HELP = (
    "library that encodes; the shards are the same. auto (default): gigatoken, many times as fast, where it is installed and can "
    "encode as the tokenizer does (sentencepiece BPE with byte fallback); else sentencepiece"
)
SHOWN_CHARACTERS = 60


class EncoderDifference(LimeError):
    """gigatoken gives other ids than sentencepiece; the message says for which text."""


def check_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Compare the ids of texts, each alone and all in one batch.

    Raises:
        EncoderDifference: some are not those of sentencepiece.
    """
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if not tokenizer.is_right(text, ids):
            raise EncoderDifference(difference(text))


def difference(text: str) -> str:
    """Say that the ids of a text differ, in one line."""
    return f"gigatoken gives other ids than sentencepiece for the text {text[:SHOWN_CHARACTERS]!a}"


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts that encoders are likely to differ in: those of `round_trip`, and with the pieces that are never merged with others."""
    whole = tokenizer.whole_tokens()
    beside = [f"a{token}b {token} {token}{other}" for token, other in zip(whole, whole[1:] + whole[:1], strict=True)]
    return [*HARD_TEXTS, "\n" * 3000, " " * 3000, "ab" * 2500, "".join(whole), *beside]


def choose_encoder(wanted: str, tokenizer: Tokenizer, texts: list[str], differs: str = "") -> Tokenizer:
    """The tokenizer with the encoder that ``--encoder`` wants; one printed line says which that is.

    Args:
        texts: a sample of the input, with which the encoder is tried.
        differs: a difference that an earlier run has seen; "" for none.

    Raises:
        LimeError: the one wanted cannot encode as the tokenizer does.
    """
    if tokenizer.encoder_name != "sentencepiece" and wanted != "auto":
        raise LimeError(f"--encoder {wanted}: {tokenizer.folder} is not a sentencepiece model; omit --encoder")
    chosen, reason = tokenizer, ""
    if wanted != "sentencepiece" and tokenizer.encoder_name == "sentencepiece":
        try:
            if differs:
                raise EncoderDifference(differs)
            chosen = tokenizer.with_gigatoken()
            check_ids(chosen, [*hard_texts(chosen), *texts])
        except (UnusableError, EncoderDifference) as error:
            reason = f"gigatoken: {error}" if isinstance(error, UnusableError) else str(error)
            if wanted == "gigatoken":
                raise LimeError(f"--encoder gigatoken: {reason}; use --encoder sentencepiece") from None
            chosen = tokenizer
    print(f"encoder: {chosen.encoder_name}{f' ({reason})' if reason else ''}")
    return chosen
