"""The facts of a tokenizer folder: the file that says which model file it has, its special ids and its hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from data_tools.tokenizer.encoders import Encoder, tokenizer_hash
from lime_dist.data.files import read_json
from lime_dist.errors import LimeError

FORMAT = "lime_dist tokenizer 1"
FACTS_FILE = "tokenizer_facts.json"
OLD_FACTS_FILE = "tokenizer.json"
"""The file's name in folders of earlier versions. Hugging Face's loaders expect a file of theirs under this name."""

MODEL_FILES = {"sentencepiece": "tokenizer.model", "huggingface": "huggingface.json"}
"""The model file of each kind of tokenizer."""

FACTS = {
    "kind": str,
    "model_sha256": str,
    "hash": str,
    "exact": bool,
    "cuttable": bool,
    "vocab_size": int,
} | dict.fromkeys(("bos_id", "eos_id", "pad_id"), int)
"""The facts that opening a tokenizer needs, with their types."""

EARLIER_FACTS: dict[str, Any] = {"kind": "sentencepiece", "exact": True, "cuttable": True}
"""Facts that folders lack which were trained before tokenizers could be imported."""

REWRITE = "train or import the tokenizer again, or copy the folder again"


def tokenizer_facts(
    encoder: Encoder, kind: str, model: bytes, special_ids: dict[str, int], **origin: dict[str, Any]
) -> dict[str, Any]:
    """The content of the facts file for the bytes of a model file.

    Args:
        origin: ``training=…`` or ``imported=…``, where the model comes from.
    """
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
        **origin,
    }


def facts_path(folder: Path) -> Path:
    """The facts file of a tokenizer folder; the one of earlier versions if it is the only one there."""
    path, old_path = folder / FACTS_FILE, folder / OLD_FACTS_FILE
    return old_path if old_path.is_file() and not path.exists() else path


def read_facts(path: Path) -> dict[str, Any]:
    """Read and check a facts file.

    Raises:
        LimeError: there is none, it has another format, or it is damaged.
    """
    hint = "give the --output of data_tools.tokenizer"
    facts = read_json(path, hint)
    if facts.get("format") != FORMAT:
        raise LimeError(f"{path}: not a tokenizer of this program; {hint}")
    facts = EARLIER_FACTS | facts
    invalid = [name for name in FACTS if not isinstance(facts.get(name), FACTS[name])]
    if invalid or facts["kind"] not in MODEL_FILES:
        raise LimeError(f"{path}: damaged, {invalid[0] if invalid else 'kind'} is invalid; {REWRITE}")
    return facts


def remove_old_facts(folder: Path) -> None:
    """Remove the facts file of earlier versions; a Hugging Face file of the same name stays."""
    path = folder / OLD_FACTS_FILE
    if path.is_file() and read_json(path, "remove it").get("format") == FORMAT:
        path.unlink()
