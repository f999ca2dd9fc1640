"""The tokenizer of an export: the trainer's tokenizer folder as files that `transformers` opens, and the proof that ids agree.

A byte-pair model becomes a ``tokenizer.json`` of the library `tokenizers`, which needs no code of ours. A unigram model keeps
its sentencepiece file and brings ``tokenization_lime.py``: `tokenizers` adds scores up in another precision and breaks ties
otherwise, at runs of one character above all (71 of 3,342 documents differed, of a byte-pair model none).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from data_tools.tokenizer import MODEL_FILES, Tokenizer
from data_tools.tokenizer_sentencepiece import SPACE_MARK
from lime_dist.data.files import json_bytes
from lime_dist.errors import LimeError

CODE = Path(__file__).parent / "huggingface"
MODEL_FILE = MODEL_FILES["sentencepiece"]


def write_tokenizer(tokenizer: Tokenizer, bos: bool, sequence_length: int, folder: Path) -> list[str]:
    """Write a tokenizer's files into ``folder``; returns the names of code files among them.

    Args:
        bos: documents began with bos in training; without, they began after an eos, and eos stands for both.
    """
    model = SentencePieceProcessor(model_file=str(tokenizer.folder / MODEL_FILE))
    ids = {"unk_token": model.unk_id(), "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    ids["bos_token"] = tokenizer.bos_id if bos else tokenizer.eos_id
    names = {key: model.id_to_piece(i) for key, i in ids.items()}
    settings: dict[str, Any] = {
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "split_special_tokens": True,
    }
    code: list[str] = []
    if tokenizer.facts["model_type"] == "bpe":
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos}
        byte_pair_tokenizer(model, tokenizer.bos_id if bos else None).save(str(folder / "tokenizer.json"))
    else:
        code = ["tokenization_lime.py"]
        settings |= {"tokenizer_class": "LimeTokenizer", "add_bos_token": bos}
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_lime.LimeTokenizer", None]}
        shutil.copyfile(CODE / code[0], folder / code[0])
        shutil.copyfile(tokenizer.folder / MODEL_FILE, folder / MODEL_FILE)
    (folder / "tokenizer_config.json").write_bytes(json_bytes(settings))
    (folder / "special_tokens_map.json").write_bytes(json_bytes(names))
    return code


def byte_pair_tokenizer(model: SentencePieceProcessor, bos_id: int | None) -> Any:
    """A `tokenizers.Tokenizer` that encodes as a byte-pair sentencepiece model does.

    Spaces are spaces in its vocabulary, not sentencepiece's mark, so that a mark in a text is like any other character
    without a piece: bytes. Merges are all ways to put a piece together from two, the best pieces first; sentencepiece prefers
    by the score of the piece alone, so two ways to one piece that overlap in a text (in runs with a period) could in principle
    be taken in another order; the export compares ids.
    """
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as Fast

    size = model.vocab_size()
    symbols = [i for i in range(size) if model.is_control(i) or model.is_unknown(i)]
    texts = [model.id_to_piece(i) for i in range(size)]
    plain = [i for i in range(size) if i not in set(symbols) and not model.is_byte(i)]
    for i in plain:
        texts[i] = texts[i].replace(SPACE_MARK, " ")
    mergeable = {texts[i]: model.get_score(i) for i in plain if "\n" not in texts[i]}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(mergeable, key=lambda text: -mergeable[text])
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]
    vocabulary = {text: i for i, text in enumerate(texts)}
    fast = Fast(models.BPE(vocabulary, merges, unk_token=texts[model.unk_id()], byte_fallback=True))
    fast.add_special_tokens([AddedToken(texts[i], special=True, normalized=False) for i in symbols])
    fast.add_tokens([AddedToken("\n", normalized=False)])  # a piece of its own that nothing is merged with
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    if bos_id is not None:
        name = texts[bos_id]
        fast.post_processor = processors.TemplateProcessing(f"{name} $A", f"{name} $A {name} $B", [(name, bos_id)])
    return fast


def check_ids(tokenizer: Tokenizer, exported: Any, texts: Iterable[str]) -> int:
    """Compare ids, and the text that comes back, for every text; returns the number of tokens compared.

    Raises:
        LimeError: they differ.
    """
    compared = 0
    for text in texts:
        wanted = tokenizer.encode(text)
        found = np.asarray(exported.encode(text, add_special_tokens=False), dtype=np.int64)
        back = exported.decode(found.tolist(), clean_up_tokenization_spaces=False)
        if not np.array_equal(wanted, found) or back != text:
            raise LimeError(
                f"the exported tokenizer reads {text[:60]!r} otherwise than {tokenizer.folder}; nothing was written"
            )
        compared += len(wanted)
    return compared
