"""Write a tokenizer's folder: first beside its place, and into it only when its texts have come back."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from data_tools.tokenizer import FACTS_FILE, FORMAT, MODEL_FILES, Encoder, tokenizer_hash
from data_tools.tokenizer_sentencepiece import SPACE_MARK
from lime_dist.data.files import json_bytes, read_json, sync_folder, write_atomic
from lime_dist.errors import LimeError

SCRATCH = ".new"
# Every byte that UTF-8 text can have is in one of these: a vocabulary that lacks one loses the characters with it.
FIRST_BYTES = [*(bytes([lead, 0x80]) for lead in range(0xC3, 0xE0)), b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"]
FIRST_BYTES += [bytes([lead, 0x80, 0x80]) for lead in range(0xE1, 0xF0)]
FIRST_BYTES += [bytes([lead, 0x80, 0x80, 0x80]) for lead in range(0xF1, 0xF5)]
EVERY_BYTE = "".join(map(chr, range(0x80))) + b"".join(FIRST_BYTES).decode() + "".join(map(chr, range(0x80, 0xC0)))
HARD_TEXTS = [
    "",
    " ",
    "  two  spaces, trailing  ",
    " one space before, one after ",
    "\n\n\ttab\r\nline feed\n",
    "\0\x01\x1f\x7f\u0085\u00a0\u200b\u2028\u3000\ufeff",
    "UPPER Case İß, ﬁ ① ｆｕｌｌ width, é, e\u0301",
    "a . b , c ! It do n't , we 'll ; ( d )",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈, 漢字かな한글, العربية, \U0010ffff",
    f"<s></s><pad><unk><0x41> {SPACE_MARK}lower{SPACE_MARK * 3} {SPACE_MARK} \u2047\ufffd",
    f"{SPACE_MARK} first",
    EVERY_BYTE,
    "x" * 5000,
    "1234567890 3.14 " * 300,
]


def tokenizer_facts(
    encoder: Encoder, kind: str, model: bytes, special_ids: dict[str, int], **more: dict[str, Any]
) -> dict[str, Any]:
    """The content of ``tokenizer.json`` for a model file's bytes; ``more`` says where it comes from."""
    return {
        "format": FORMAT,
        "kind": kind,
        "model_type": encoder.model_type,
        "vocab_size": encoder.vocab_size,
        **{f"{name}_id": number for name, number in special_ids.items()},
        "hash": tokenizer_hash(encoder, special_ids),
        "model_sha256": hashlib.sha256(model).hexdigest(),
        "exact": True,
        "cuttable": True,
        **more,
    }


def existing_facts(output: Path) -> dict[str, Any] | None:
    """The facts of the tokenizer in a folder, None if it has none; LimeError if what it has is not this program's."""
    if (output / FACTS_FILE).exists():
        facts = read_json(output / FACTS_FILE, "give another --output")
        if facts.get("format") == FORMAT:
            return facts
        strange = [FACTS_FILE]
    else:
        strange = [name for name in MODEL_FILES.values() if (output / name).exists()]
    if strange and not (output / SCRATCH).exists():  # else a killed run left it
        raise LimeError(f"{output}: holds a {strange[0]} that is not this program's; give another --output")
    return None


def write_beside(output: Path, model: bytes, facts: dict[str, Any]) -> Path:
    """Write a tokenizer into a folder inside ``output``, where it can be opened and tried, and give that folder."""
    scratch = output / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    write_atomic(scratch / MODEL_FILES[facts["kind"]], model)
    write_atomic(scratch / FACTS_FILE, json_bytes(facts))
    return scratch


def replace_folder(new: Path, folder: Path) -> None:
    """Move a finished tokenizer's files from ``new`` to their place, facts last, and remove ``new``."""
    for name in (FACTS_FILE, *MODEL_FILES.values()):
        (folder / name).unlink(missing_ok=True)
    for name in (*MODEL_FILES.values(), FACTS_FILE):
        if (new / name).exists():
            (new / name).replace(folder / name)
    sync_folder(folder)
    shutil.rmtree(new)
