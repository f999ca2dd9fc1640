"""Small tokenizers with the components of GPT-2's, LLaMA-2's (written in three ways) and LLaMA-3's, and texts for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
MARK = "\u2581"
TEXTS = [
    (Path(__file__).parents[2] / "LICENSE").read_text(),
    "for i in range(10):\n    if x[i] == 'a':\n        return f(x, 12)  # don't\n\n\tprint(\"it's\")\n" * 20,
    "It's 12 o'clock, don't wait; \u4e16\u754c \u6f22\u5b57, na\u00efve caf\u00e9 \U0001f600\n" * 5,
]

# Text that tokenizers treat specially, or that some of them get wrong.
BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", " \n", "\t", "\0", "\u0085", "\u00a0", "\u2028", "\u3000", "\x1c"]
LETTERS = ["a", "b1", " the", "The", "é", "e\u0301", "漢", "ß", "İ", "12", "345", "_", "😀", "\u200d", MARK, MARK * 2]
SIGNS = [
    "'s",
    "don't",
    ".",
    "!?",
    "//",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|",
    "|>",
]
ATOMS = BLANKS + LETTERS + SIGNS
rough = st.lists(st.sampled_from(ATOMS), max_size=12).map("".join)
any_text = st.one_of(st.text(max_size=30), rough, st.tuples(rough, st.text(max_size=5), rough).map("".join))
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def train_sentencepiece(**options: Any) -> bytes:
    """Train a sentencepiece model with LLaMA-2's settings, except for ``options``."""
    model = io.BytesIO()
    usual: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        "split_digits": True,
        "minloglevel": 3,
        "sentence_iterator": (line for text in TEXTS for line in text.splitlines() if line),
    }
    sentencepiece.SentencePieceTrainer.train(model_writer=model, **(usual | options))
    return model.getvalue()


def llama_2(model: bytes, components: str = "normalizer") -> tokenizers.Tokenizer:
    """Return the Hugging Face form of a sentencepiece BPE model, with its prefix in the "normalizer" or in a "metaspace"."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges: list[tuple[str, str]] = []
    for piece in sorted(vocabulary, key=lambda piece: -pieces.get_score(vocabulary[piece])):
        if pieces.is_byte(vocabulary[piece]) or pieces.is_control(vocabulary[piece]):
            continue
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if components == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="first", split=False)
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def gpt_2(**training: Any) -> tokenizers.Tokenizer:
    """Byte-level BPE whose one special token is <|endoftext|>."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    usual: dict[str, Any] = {
        "vocab_size": 700,
        "special_tokens": ["<|endoftext|>"],
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
    }
    trainer = trainers.BpeTrainer(show_progress=False, **(usual | training))
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def llama_3() -> tokenizers.Tokenizer:
    """Byte-level BPE over LLaMA-3's own splits, with special tokens after the vocabulary and a template with bos."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    bos = tokenizer.token_to_id(names[0])
    tokenizer.post_processor = processors.TemplateProcessing(f"{names[0]} $A", None, [(names[0], bos)])
    return tokenizer
