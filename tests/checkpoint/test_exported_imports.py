"""Protects exports of runs with imported tokenizers: transformers gives the ids that the shards have."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.__main__ import main as tokenizer_command
from data_tools.tokenizer.round_trip import HARD_TEXTS
from lime_dist.export.tokenizer_files import check_ids, write_tokenizer

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("data_tools.tokenizer.importing", reason="tokenizers cannot be imported yet")
vocabularies = pytest.importorskip("support.vocabularies", reason="tokenizers cannot be imported yet")
END = {"gpt_2": "<|endoftext|>", "llama_3": "<|end_of_text|>"}


@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("kind", ["gpt_2", "llama_3", "llama_2 normalizer", "llama_2 metaspace", "sentencepiece"])
def test_imported_tokenizers_give_exactly_the_same_ids(kind: str, bos: bool, tmp_path: Path) -> None:
    """Byte-level tokenizers, and LLaMA-2's in three forms, which put a space before a text; a leading space is kept."""
    source = tmp_path / ("source.model" if kind == "sentencepiece" else "tokenizer.json")
    name, _, components = kind.partition(" ")
    if name == "sentencepiece":
        source.write_bytes(vocabularies.train_sentencepiece())
    elif name == "llama_2":
        vocabularies.llama_2(vocabularies.train_sentencepiece(), components).save(str(source))
    else:
        getattr(vocabularies, name)().save(str(source))
    command = ["import", "--model", str(source), "--output", str(tmp_path / "ours")]
    tokenizer_command([*command, *(["--eos", END[name]] if name in END else [])])
    ours = Tokenizer(tmp_path / "ours")
    bos = bos and ours.bos_id >= 0
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(ours, bos, 128, out)
    assert bool(list(out.glob("*.py"))) == (kind == "sentencepiece")
    theirs = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=kind == "sentencepiece")
    record = check_ids(ours, theirs, [*HARD_TEXTS, *vocabularies.TEXTS])
    assert record["compared_tokens"] > 3000 and record["exact_for_space_marks"] == (name != "llama_2")
    start = [ours.bos_id] if bos else []
    assert theirs(" x\n y").input_ids == [*start, *ours.encode(" x\n y").tolist()]
    assert theirs.eos_token_id == ours.eos_id and theirs.pad_token_id >= 0
