"""Protects trained tokenizers: texts are decoded exactly, the same seed gives the same pieces, no document is skipped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from support.vocabularies import TEXTS, any_text, quick

from data_tools.sources.documents import documents
from data_tools.sources.inputs import list_inputs
from data_tools.sources.tally import Tally
from data_tools.tokenizer import Tokenizer, training
from data_tools.tokenizer.__main__ import main
from data_tools.tokenizer.facts import FACTS_FILE
from data_tools.tokenizer.pieces import BETWEEN_WORDS, cut
from data_tools.tokenizer.round_trip import EVERY_BYTE, HARD_TEXTS
from data_tools.tokenizer.tokenizer import PIECE_CHARACTERS
from data_tools.tokenizer.training import file_budgets, sample_documents
from lime_dist.errors import LimeError


def train(corpus: Path, folder: Path, *options: str) -> Tokenizer:
    main(["train", "--input", str(corpus), "--output", str(folder), "--vocab-size", "500", *options])
    return Tokenizer(folder)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def either(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(corpus, tmp_path_factory.mktemp(request.param), "--model-type", request.param)


def test_every_text_is_decoded_exactly(either: Tokenizer, corpus: Path) -> None:
    texts = [*HARD_TEXTS, *(text for *_, text in documents(list_inputs(str(corpus)), "text", Tally()))]
    for text, ids in zip(texts, either.encode_batch(texts), strict=True):
        assert either.decode(ids) == text
        assert ids.size == 0 or (0 <= ids.min() and ids.max() < either.vocab_size)
        np.testing.assert_array_equal(ids, either.encode(text))


@given(text=any_text)
@quick
def test_any_text_is_decoded_exactly(either: Tokenizer, text: str) -> None:
    ids = either.encode(text)
    assert either.decode(ids) == text and not np.isin(ids, [0, 1, 2, 3]).any()
    assert either.decode(either.encode_in_pieces(text, 5)) == text


def test_the_hard_texts_have_every_byte_of_utf_8() -> None:
    """A vocabulary needs every byte except those that never occur in UTF-8 (C0, C1, F5 to FF)."""
    assert sorted(set(EVERY_BYTE.encode())) == [*range(0xC0), *range(0xC2, 0xF5)]


def test_pieces_follow_the_settings(either: Tokenizer, tmp_path: Path) -> None:
    """256 bytes for fallback, no piece with two digits even if they often occur together, and the specified ids."""
    texts = [*TEXTS[0].split("\n\n"), *["In 2024 and 1999, 100 of 1000 or 2024"] * 500]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    given = ["train", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "t"), "--vocab-size", "400"]
    main([*given, "--model-type", either.facts["model_type"]])
    one = Tokenizer(tmp_path / "t")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t" / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    bytes_known = [piece for i, piece in enumerate(pieces) if model.is_byte(i)]
    assert bytes_known == [f"<0x{byte:02X}>" for byte in range(256)]
    assert not [piece for i, piece in enumerate(pieces) if not model.is_byte(i) and sum(map(str.isdigit, piece)) > 1]
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (one.bos_id, one.eos_id, one.pad_id, one.vocab_size) == (1, 2, 3, 400)
    assert one.exact and one.facts["kind"] == "sentencepiece" and one.encode("1234").size >= 4


def test_another_process_learns_the_same_pieces(either: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    """BPE and unigram, with another string hash seed and more threads allowed."""
    given = ["--input", str(corpus), "--output", str(tmp_path), "--vocab-size", "500"]
    subprocess.run(
        [sys.executable, "-m", "data_tools.tokenizer", "train", *given, "--model-type", either.facts["model_type"]],
        env=os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
        check=True,
        capture_output=True,
    )
    assert Tokenizer(tmp_path).facts == either.facts


def test_a_folder_from_before_imports_existed(trained: Tokenizer, tmp_path: Path) -> None:
    facts = {key: value for key, value in trained.facts.items() if key not in ("kind", "exact", "cuttable")}
    shutil.copytree(trained.folder, tmp_path / "t")
    (tmp_path / "t" / FACTS_FILE).write_text(json.dumps(facts))
    one = Tokenizer(tmp_path / "t")
    assert (
        one.exact
        and one.hash == trained.hash
        and one.encode("some text").tolist() == trained.encode("some text").tolist()
    )


def test_encoding_in_pieces_gives_the_same_ids(
    either: Tokenizer, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for *_, text in documents(list_inputs(str(corpus)), "text", Tally()) if "xxxx" not in text]
    texts += ["a  b   c" * 40, " \n \n\n  x " * 40]
    whole = either.encode_batch(texts)
    monkeypatch.setattr("data_tools.tokenizer.tokenizer.PIECE_CHARACTERS", 100)
    for expected, ids in zip(whole, either.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, expected)


def test_a_very_long_document(trained: Tokenizer) -> None:
    text = "long words and spaces \n" * (2 * PIECE_CHARACTERS // 23)
    assert trained.decode(trained.encode(text)) == text


def test_pieces_concatenate_to_the_text_and_respect_the_limit() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(generator.choice(list("ab \n"), size=int(generator.integers(0, 60)), p=[0.4, 0.3, 0.2, 0.1]))
        pieces = cut(text, 7)
        assert "".join(pieces) == text and all(len(piece) <= 7 for piece in pieces)
    assert cut("one two\nthree four", 10) == ["one two\n", "three four"]
    assert cut("one.\ntwo  \nthree four", 12, BETWEEN_WORDS) == ["one.\n", "two  \nthree", " four"]
    assert cut("one\n\ntwo\n !", 9, BETWEEN_WORDS) == ["one\n\ntwo\n", " !"]  # no place to cut, so at the limit
    assert cut("one   three", 6) == ["one", "   three"[:6], "ee"] and cut("x" * 9, 4) == ["xxxx", "xxxx", "x"]


def test_facts_and_special_ids(trained: Tokenizer) -> None:
    assert (trained.vocab_size, trained.bos_id, trained.eos_id, trained.pad_id) == (500, 1, 2, 3)
    assert trained.decode([1, 2, 3]) == "" and trained.encode("\n").size == 1  # a newline is one symbol
    assert trained.encode("1234").size >= 4  # digits are split
    with pytest.raises(LimeError, match=r"token ids 5..500 are outside the vocabulary of 500"):
        trained.decode([5, 500])


def test_the_same_input_and_seed_give_the_same_pieces(
    corpus: Path, trained: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--sample-megabytes", "0.05"
    again = train(corpus, tmp_path / "again")
    assert again.hash == trained.hash and again.facts == trained.facts
    hashes = [train(corpus, tmp_path / f"{i}", *small, "--seed", seed).hash for i, seed in enumerate("112")]
    assert hashes[0] == hashes[1] != hashes[2]
    capsys.readouterr()
    train(corpus, tmp_path / "again")
    assert "complete, reused" in capsys.readouterr().out
    with pytest.raises(LimeError, match="trained with other seed; give another --output, or --fresh"):
        train(corpus, tmp_path / "again", "--seed", "5")
    assert train(corpus, tmp_path / "again", "--seed", "5", "--fresh").facts["training"]["seed"] == 5


def test_long_documents_are_trained_on(tmp_path: Path) -> None:
    """A word that occurs only inside one document of 300 KB becomes a piece (sentencepiece alone skips the document),
    and so does one of a document without spaces whose characters have three bytes."""
    lines = [json.dumps({"text": f"short text {i}"}) for i in range(50)]
    lines += [json.dumps({"text": "the zyzzyva sings " * 15000}), json.dumps({"text": "漢字" * 15000})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    main(["train", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "t"), "--vocab-size", "310"])
    assert Tokenizer(tmp_path / "t").encode(" zyzzyva").size == 1
    assert Tokenizer(tmp_path / "t").encode("a漢字漢字").size <= 3


def test_the_sample_is_even_over_files(corpus: Path) -> None:
    assert file_budgets([10, 1000, 1000], 300) == [10, 145, 145]
    assert file_budgets([10, 20], 300) == [10, 20]
    files, taken = list_inputs(str(corpus)), dict[str, int]()
    source = {text: name for name, _, text in documents(list_inputs(str(corpus)), "text", Tally())}
    for text, size in sample_documents(files, "text", 90_000, 0, Tally()):
        taken[source[text]] = taken.get(source[text], 0) + size
    assert set(taken) == {"a.parquet", "c.jsonl", "inner/b.parquet"}
    assert all(25_000 < size <= 30_000 for size in taken.values())


def test_a_model_that_loses_text_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(LimeError, match="the trained tokenizer changes this text and is rejected"):
        train(corpus, tmp_path / "t")
    assert [path.name for path in (tmp_path / "t").iterdir()] == [".lock"]


def test_a_changed_model_is_refused_on_load(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    shutil.copytree(tokenizer_folder, folder)
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(
        LimeError, match=r"tokenizer.model: its content does not match the hash in tokenizer_facts.json"
    ):
        Tokenizer(folder)
    model.unlink()
    with pytest.raises(LimeError, match=r"tokenizer.model: missing"):
        Tokenizer(folder)
    with pytest.raises(LimeError, match=r"tokenizer_facts.json: no such file"):
        Tokenizer(tmp_path / "nowhere")


def test_failed_training_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "too little"}\n')
    given = ["train", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "t"), "--vocab-size"]
    with pytest.raises(LimeError, match="cannot train 5000 pieces on this input: .*lower --vocab-size"):
        main([*given, "5000"])
    letters = "".join(chr(code) for code in range(0x400, 0x440))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": letters}) + "\n")
    with pytest.raises(LimeError, match="cannot train 270 pieces on this input: .*; raise --vocab-size$"):
        main([*given, "270"])
    with pytest.raises(LimeError, match="must be at least 262"):
        main([*given, "100"])
    with pytest.raises(LimeError, match="no text in column 'content'"):
        main([*given, "400", "--text-column", "content"])
    assert training.UNK_ID == 0


SYMBOLS = ("<answer>", "<|end|>", "é→")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def marked(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(f"marked-{request.param}")
    return train(corpus, folder, "--model-type", request.param, *(f"--symbol={symbol}" for symbol in SYMBOLS))


def test_a_symbol_is_one_token_everywhere(marked: Tokenizer) -> None:
    """Its id is in the facts, and the tokens of the text around it do not change."""
    ids = marked.facts["symbols"]
    assert list(ids) == list(SYMBOLS) and len(set(ids.values())) == 3
    for symbol, number in ids.items():
        for left, right in (
            ("", ""),
            ("a", "b"),
            ("the ", " the"),
            ("1", "1"),
            ("\n", "\n"),
            ("<", ">"),
            ("\u2581", "\u2581"),
        ):
            encoded = marked.encode(left + symbol + right).tolist()
            assert encoded == [*marked.encode(left).tolist(), number, *marked.encode(right).tolist()]
    assert marked.encode("".join(SYMBOLS)).tolist() == list(ids.values())
    assert not set(marked.encode("<answer").tolist()) & set(ids.values())


@given(parts=st.lists(st.one_of(any_text, st.sampled_from(SYMBOLS)), max_size=6))
@quick
def test_texts_with_symbols_are_decoded_exactly(marked: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = marked.encode(text)
    assert marked.decode(ids) == text
    for symbol, number in marked.facts["symbols"].items():
        assert ids.tolist().count(number) == text.count(symbol)


def test_symbols_change_nothing_else(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without symbols the facts do not mention them; training into a folder with other symbols is refused."""
    plain = train(corpus, tmp_path / "plain")
    assert "symbols" not in plain.facts and "symbols" not in plain.facts["training"]
    one = train(corpus, tmp_path / "one", "--symbol", "<answer>")
    assert f"symbol <answer>: always the single token {one.facts['symbols']['<answer>']}" in capsys.readouterr().out
    train(corpus, tmp_path / "one", "--symbol", "<answer>")
    assert "tokenizer complete, reused" in capsys.readouterr().out
    for folder, options in (("one", []), ("plain", ["--symbol", "<answer>"])):
        with pytest.raises(LimeError, match="trained with other symbols; give another --output"):
            train(corpus, tmp_path / folder, *options)


def test_input_without_spaces_can_be_trained_on(tmp_path: Path) -> None:
    """Its smallest vocabulary: the bytes, the symbols, a space, and a piece for each character."""
    lines = [json.dumps({"text": f"{n}+{n}={2 * n}"}) for n in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    main(["train", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "t"), "--vocab-size", "274"])
    opened = Tokenizer(tmp_path / "t")
    assert opened.encode("12+12=24").size == 8 and opened.decode(opened.encode(" a  b ")) == " a  b "


@pytest.mark.parametrize(
    ("symbols", "line"),
    [
        (["a b"], "--symbol 'a b': must be printable characters without spaces"),
        ([""], "--symbol '': must be printable"),
        (["a\n"], "must be printable"),
        (["\u2581x"], "must be printable"),
        (["<s>"], "--symbol <s>: the tokenizer has a piece of this name"),
        (["<0x41>"], "the tokenizer has a piece of this name"),
        (["<a>", "<a>"], "--symbol <a> --symbol <a>: a symbol is given twice"),
    ],
)
def test_symbols_that_cannot_be(symbols: list[str], line: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(LimeError, match=re.escape(line)):
        train(corpus, tmp_path / "t", *(f"--symbol={symbol}" for symbol in symbols))
    assert not (tmp_path / "t").exists()
