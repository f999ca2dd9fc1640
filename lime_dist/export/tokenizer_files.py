"""Write a tokenizer folder of the trainer as files that `transformers` opens, and check that the ids agree.

A Hugging Face tokenizer is written as it was imported. A byte-pair sentencepiece model becomes a ``tokenizer.json`` of the
library `tokenizers` and needs no code. A unigram model keeps its sentencepiece file and brings ``tokenization_lime.py``, because
`tokenizers` sums scores in another precision and breaks ties differently, mostly in runs of one character (71 of 3,342 documents
differed; with a byte-pair model, none).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.facts import MODEL_FILES
from data_tools.tokenizer.model_file import USER_DEFINED, read_pieces, read_settings
from data_tools.tokenizer.pieces import SPACE_MARK
from lime_dist.data.files import json_bytes
from lime_dist.errors import LimeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast

CODE = Path(__file__).parent / "huggingface"
MODEL_FILE = MODEL_FILES["sentencepiece"]
HUGGINGFACE_FILE = MODEL_FILES["huggingface"]


def write_tokenizer(tokenizer: Tokenizer, bos: bool, sequence_length: int, folder: Path) -> None:
    """Write a tokenizer's files into ``folder``.

    Args:
        bos: whether documents began with bos in training. If not, they began after an eos, and eos serves as bos too.
    """
    settings: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "split_special_tokens": True,
    }
    ids = special_ids(tokenizer, bos)
    fast: Fast | None
    if tokenizer.facts.get("kind") == "huggingface":
        fast = imported_tokenizer(tokenizer.folder / HUGGINGFACE_FILE)
        names = {key.removesuffix("_id"): str(fast.id_to_token(token_id)) for key, token_id in ids.items()}
    else:
        model = SentencePieceProcessor(model_file=str(tokenizer.folder / MODEL_FILE))
        names = {key.removesuffix("_id"): model.id_to_piece(token_id) for key, token_id in ids.items()}
        names["unk_token"] = model.id_to_piece(model.unk_id())
        fast = byte_pair_tokenizer(model) if is_plain_byte_pair(model) else None
    if fast is not None:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if bos:
            begin_with(fast, names["bos_token"], ids["bos_token_id"])
        fast.save(str(folder / "tokenizer.json"))
    else:
        settings |= {"tokenizer_class": "LimeTokenizer", "begins_with_bos": bos}
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_lime.LimeTokenizer", None]}
        shutil.copyfile(CODE / "tokenization_lime.py", folder / "tokenization_lime.py")
        shutil.copyfile(tokenizer.folder / MODEL_FILE, folder / MODEL_FILE)
    (folder / "tokenizer_config.json").write_bytes(json_bytes({**names, **settings}))


def special_ids(tokenizer: Tokenizer, bos: bool) -> dict[str, int]:
    """The ids of bos, eos and pad in an export. eos replaces a missing pad, and bos if documents do not begin with bos."""
    eos = tokenizer.eos_id
    ids = {"bos_token_id": tokenizer.bos_id if bos else -1, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}
    return {key: eos if token_id < 0 else token_id for key, token_id in ids.items()}


def is_plain_byte_pair(model: SentencePieceProcessor) -> bool:
    """Whether `byte_pair_tokenizer` can replace a model: it is a byte-pair model that does not normalise its text."""
    settings = read_settings(model.serialized_model_proto())
    return settings.model_type == "bpe" and not (
        settings.character_map
        or settings.add_dummy_prefix
        or settings.remove_extra_whitespaces
        or not settings.escape_whitespaces
        or settings.treat_whitespace_as_suffix
    )


def begin_with(fast: Fast, token: str, token_id: int) -> None:
    """Make a tokenizer put a token before every text."""
    from tokenizers import processors

    fast.post_processor = processors.TemplateProcessing(f"{token} $A", f"{token} $A {token} $B", [(token, token_id)])


def imported_tokenizer(file: Path) -> Fast:
    """A Hugging Face tokenizer as the trainer uses it.

    Some tokenizers put a space before a text that has no leading space, and remove one when they decode. A text with a leading
    space would lose it, so the trainer adds a second one. In an export the normalizer does this.
    """
    from tokenizers import Regex, normalizers
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(file))
    fast.encode_special_tokens = True
    if [fast.decode(fast.encode(text, add_special_tokens=False).ids) for text in (" a", "  a")] == ["a", " a"]:
        first = normalizers.Replace(Regex(r"\A "), "  ")
        fast.normalizer = normalizers.Sequence([first, fast.normalizer] if fast.normalizer else [first])
    return fast


def byte_pair_tokenizer(model: SentencePieceProcessor) -> Fast:
    """A `tokenizers.Tokenizer` that encodes as a byte-pair sentencepiece model does.

    Its vocabulary spells spaces as spaces instead of sentencepiece's mark U+2581, so a mark in a text is encoded as bytes, like
    any other character without a piece. The merges are all pairs of pieces that form a piece, those with the best result first.
    sentencepiece ranks merges by the score of the result only. Two pairs with the same result that overlap in a text (in
    repetitive runs) could therefore be merged in another order; the export compares ids to exclude this.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Fast

    size = model.vocab_size()
    kinds = [piece.type for piece in read_pieces(model.serialized_model_proto())]
    symbols = [i for i in range(size) if model.is_control(i) or model.is_unknown(i)]
    texts = [model.id_to_piece(i) for i in range(size)]
    plain = [i for i in range(size) if i not in set(symbols) and not model.is_byte(i)]
    for i in plain:
        texts[i] = texts[i].replace(SPACE_MARK, " ")
    # Pieces that are never merged with others.
    whole = [texts[i] for i in plain if kinds[i] == USER_DEFINED or texts[i] == "\n"]
    mergeable = {texts[i]: model.get_score(i) for i in plain if "\n" not in texts[i] and texts[i] not in whole}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(mergeable, key=lambda text: -mergeable[text])
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]
    vocabulary = {text: i for i, text in enumerate(texts)}
    fast = Fast(models.BPE(vocabulary, merges, unk_token=texts[model.unk_id()], byte_fallback=True))
    fast.add_special_tokens([AddedToken(texts[i], special=True, normalized=False) for i in symbols])
    fast.add_tokens([AddedToken(text, normalized=False) for text in whole])
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return fast


def check_ids(tokenizer: Tokenizer, exported: Any, texts: Iterable[str]) -> dict[str, Any]:
    """Compare the ids and the decoded text of every text.

    One difference is accepted and recorded: an imported Hugging Face tokenizer that writes spaces as U+2581 encodes this
    character as a space, while the trainer encodes it as bytes. `tokenizers` has no means to tell the two apart.

    Returns:
        Entries of the certificate's section ``tokenizer``.

    Raises:
        LimeError: a text gets other ids, or decodes to another text.
    """
    marks = [f"a{SPACE_MARK}b"]
    marks_agree = tokenizer.facts.get("kind") != "huggingface" or _first_difference(tokenizer, exported, marks) is None
    compared = [text for text in texts if marks_agree or SPACE_MARK not in text]
    different = _first_difference(tokenizer, exported, compared)
    if different is not None:
        raise LimeError(
            f"the exported tokenizer encodes {different[:60]!r} differently from {tokenizer.folder}; nothing was exported"
        )
    return {"compared_tokens": sum(map(len, tokenizer.encode_batch(compared))), "exact_for_space_marks": marks_agree}


def _first_difference(tokenizer: Tokenizer, exported: Any, texts: Iterable[str]) -> str | None:
    """The first text with other ids or another decoded text; None: there is none."""
    for text in texts:
        wanted = tokenizer.encode(text)
        ids = np.asarray(exported.encode(text, add_special_tokens=False), dtype=np.int64)
        decoded = exported.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        if not np.array_equal(wanted, ids) or decoded != tokenizer.decode(wanted):
            return text
    return None
