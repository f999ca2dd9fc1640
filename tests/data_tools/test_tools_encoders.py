"""Protects the ids: gigatoken and sentencepiece write the same shards, and where they would not, nothing of it is kept."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.vocabularies import any_text, quick, train_sentencepiece

from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.tokenizer import Tokenizer, gigatoken_encoder
from data_tools.tokenizer.__main__ import main as tokenizer
from data_tools.tokenizer.encoder_choice import choose_encoder, hard_texts
from data_tools.tokenizer.gigatoken_encoder import gigatoken_model
from lime_dist.errors import LimeError

# Models that tempt an encoder: pieces that spell control symbols, symbols that overlap, a prefix, no space in any piece.
SPELLED = "<unk> <unk> <s> </s> <pad> <0x41> <0x0A> unk> k> x41> s> ad> <un <p </ a<un b<un c<un a<0x4 b<0x4 c<0x4 41>"
SYMBOLS = ["<answer>", "<ans", "foo", "foofoo", "oof", "12"]
MODELS: dict[str, Callable[[], bytes]] = {
    "spelled": lambda: train_sentencepiece(
        sentence_iterator=iter([SPELLED] * 200),
        vocab_size=300,
        user_defined_symbols=["\n"],
        add_dummy_prefix=False,
        split_digits=False,
        split_by_number=False,
        split_by_unicode_script=False,
    ),
    "symbols": lambda: train_sentencepiece(user_defined_symbols=["\n", *SYMBOLS], add_dummy_prefix=False),
    "prefix": train_sentencepiece,
    "no spaces": lambda: train_sentencepiece(
        sentence_iterator=iter(["漢字かな漢字" * 9] * 9),
        vocab_size=270,
        user_defined_symbols=["\n", "\u2581"],
        add_dummy_prefix=False,
    ),
}
temptations = st.lists(st.one_of(any_text, st.sampled_from([*SYMBOLS, "<unk>", "<0x41>", "<", "s>"])), max_size=6)


def write_model(folder: Path, model: bytes) -> Tokenizer:
    folder.mkdir()
    (folder / "any.model").write_bytes(model)
    tokenizer(["import", "--model", str(folder / "any.model"), "--output", str(folder / "t")])
    return Tokenizer(folder / "t")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Tokenizer]]:
    """Each model with sentencepiece and with gigatoken."""
    folder = tmp_path_factory.mktemp("models")
    slow = [write_model(folder / name, make()) for name, make in MODELS.items()]
    return [(one, one.with_gigatoken()) for one in slow]


def equal(pair: tuple[Tokenizer, Tokenizer], texts: list[str]) -> bool:
    slow, fast = (one.encode_batch(texts) for one in pair)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(slow, fast, strict=True))


def test_hard_texts_have_the_same_ids(pairs: list[tuple[Tokenizer, Tokenizer]]) -> None:
    for pair in pairs:
        texts = [*hard_texts(pair[0]), SPELLED, "<unk><s></s><pad><0x41>" * 50, "foofoofoo" * 40, "漢字 かな" * 30]
        assert equal(pair, texts)
        assert pair[0].hash == pair[1].hash and pair[1].encoder_name == "gigatoken"
        with pytest.raises(UnicodeEncodeError):
            pair[1].encode("lone \ud800 surrogate")


@given(parts=temptations)
@quick
def test_any_text_has_the_same_ids(pairs: list[tuple[Tokenizer, Tokenizer]], parts: list[str]) -> None:
    assert all(equal(pair, ["".join(parts), *parts]) for pair in pairs)


def test_forgetting_changes_no_ids(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, starts = np.random.default_rng(0), list[int]()
    texts = [" ".join(map(str, generator.integers(0, 2**62, 500))) for _ in range(200)]  # no word occurs twice
    monkeypatch.setattr(gigatoken_encoder, "MOST_GROWTH", 2 << 20)
    begin = gigatoken_encoder.GigatokenEncoder._start
    monkeypatch.setattr(gigatoken_encoder.GigatokenEncoder, "_start", lambda self: (starts.append(1), begin(self))[1])
    fast = trained.with_gigatoken()
    ids = [one for text in texts for one in fast.encode_batch([text])]
    assert len(starts) > 1  # gigatoken's memory would have grown by up to 8 MB
    assert all(trained.with_gigatoken().is_right(text, one) for text, one in zip(texts, ids, strict=True))


# Pretokenizing


def run(corpus: Path, tokenizer_folder: Path, output: Path, encoder: str) -> None:
    settings = "--validation-fraction 0.1 --shard-tokens 3000 --workers 1 --max-rejected 0.2".split()
    places = ["--input", str(corpus), "--tokenizer", str(tokenizer_folder), "--output", str(output)]
    pretokenize([*places, *settings, "--encoder", encoder])


def shards(folder: Path) -> dict[str, bytes]:
    """All that training reads."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in (".bin", ".idx", ".json")}


def encoders(folder: Path) -> list[str]:
    return [json.loads(line)["encoder"] for line in (folder / "units.ndjson").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def odd_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the corpus; rows that are no text; and documents with q, which begin a unit that is not the first."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copy(corpus / "a.parquet", folder)
    rows = [b"bad \xff bytes", b"cut \xf0\x9f\x98", b"<s></s>\0 \n\n  \t<pad>", b" " * 3000 + b".", b"a" * 5000]
    pq.write_table(pa.table({"text": pa.array(rows, pa.binary()).cast(pa.large_binary())}), folder / "b.parquet")
    (folder / "d.jsonl").write_text('{"text": "lone \\ud800"}\n{"text": "pair \\ud83d\\ude00 \\u0000"}\n')
    texts = ["qqqq qqqqqq qqq " * 900, "ordinary text. " * 900]
    pq.write_table(pa.table({"text": texts}), folder / "q.parquet", row_group_size=1)
    return folder


@pytest.fixture(scope="module")
def odd_tokenizer(odd_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd-tokenizer")
    tokenizer(["train", "--input", str(odd_corpus), "--output", str(folder), "--vocab-size", "500"])
    return folder


@pytest.fixture(scope="module")
def expected(odd_corpus: Path, odd_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sentencepiece writes."""
    folder = tmp_path_factory.mktemp("expected") / "shards"
    run(odd_corpus, odd_tokenizer, folder, "sentencepiece")
    return folder


def without_merges(letters: str) -> Callable[[bytes], str]:
    """An artificial difference: the converted model lacks the merges into pieces with some letters."""

    def convert(data: bytes) -> str:
        content = json.loads(gigatoken_model(data))
        merges = content["model"]["merges"]
        content["model"]["merges"] = [pair for pair in merges if not set(letters) & set("".join(pair))]
        assert len(content["model"]["merges"]) < len(merges)
        return json.dumps(content)

    return convert


def test_both_encoders_write_the_same_shards_and_continue_each_others(
    odd_corpus: Path, odd_tokenizer: Path, expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(odd_corpus, odd_tokenizer, tmp_path, "auto")
    assert "encoder: gigatoken\n" in capsys.readouterr().out
    assert shards(tmp_path) == shards(expected) and set(encoders(tmp_path)) == {"gigatoken"}
    for encoder in ("sentencepiece", "gigatoken"):
        lost = sorted(tmp_path.glob("train-*.bin"))[1 if encoder == "gigatoken" else 2]
        lost.unlink()
        run(odd_corpus, odd_tokenizer, tmp_path, encoder)
        assert f"encoder: {encoder}\n" in capsys.readouterr().out
        assert shards(tmp_path) == shards(expected)
    assert sorted(set(encoders(tmp_path))) == ["gigatoken", "sentencepiece"]


def test_a_difference_at_the_start_is_seen_before_anything_is_written(
    odd_corpus: Path,
    odd_tokenizer: Path,
    expected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gigatoken_encoder, "gigatoken_model", without_merges("aeiou"))
    with pytest.raises(
        LimeError, match="--encoder gigatoken: gigatoken gives other ids .*; use --encoder sentencepiece"
    ):
        run(odd_corpus, odd_tokenizer, tmp_path, "gigatoken")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    run(odd_corpus, odd_tokenizer, tmp_path, "auto")
    assert "encoder: sentencepiece (gigatoken gives other ids than sentencepiece for" in capsys.readouterr().out
    assert shards(tmp_path) == shards(expected) and set(encoders(tmp_path)) == {"sentencepiece"}


def test_a_difference_while_running_leaves_no_shard_of_that_encoder(
    odd_corpus: Path,
    odd_tokenizer: Path,
    expected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gigatoken_encoder, "gigatoken_model", without_merges("q"))
    stopped, fallen_back = tmp_path / "stopped", tmp_path / "fallen-back"
    with pytest.raises(
        LimeError, match=r"unit \d+ \(q.parquet\): gigatoken gives other ids .* with its ids are deleted"
    ):
        run(odd_corpus, odd_tokenizer, stopped, "gigatoken")
    assert not encoders(stopped) and not [*stopped.glob("train-*"), *stopped.glob("validation-*")]
    run(odd_corpus, odd_tokenizer, stopped, "sentencepiece")
    assert shards(stopped) == shards(expected)

    run(odd_corpus, odd_tokenizer, fallen_back, "auto")
    out = capsys.readouterr().out
    assert "encoder: gigatoken\n" in out and "going on with sentencepiece; the " in out
    assert "the 0 finished units" not in out  # there were some to encode again
    assert shards(fallen_back) == shards(expected) and set(encoders(fallen_back)) == {"sentencepiece"}

    # A later run does not begin with gigatoken again, though the unit in which it differed is finished.
    sorted(fallen_back.glob("train-*.bin"))[0].unlink()
    with pytest.raises(LimeError, match="--encoder gigatoken: unit .* gives other ids"):
        run(odd_corpus, odd_tokenizer, fallen_back, "gigatoken")
    run(odd_corpus, odd_tokenizer, fallen_back, "auto")
    assert "encoder: sentencepiece (unit " in capsys.readouterr().out
    assert shards(fallen_back) == shards(expected)


def test_models_that_only_sentencepiece_can_encode_with(
    tmp_path: Path, trained: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {
        "it cannot encode with unigram models": train_sentencepiece(model_type="unigram", vocab_size=450),
        "it needs a model with byte fallback": train_sentencepiece(byte_fallback=False, vocab_size=300),
        "it cannot change texts as this model does": train_sentencepiece(normalization_rule_name="nfkc"),
    }
    cases = []
    for number, (reason, model) in enumerate(models.items()):
        (tmp_path / f"{number}.model").write_bytes(model)
        command = ["import", "--model", str(tmp_path / f"{number}.model"), "--output", str(tmp_path / f"{number}")]
        tokenizer([*command, "--allow-loss"])
        cases.append((reason, Tokenizer(tmp_path / f"{number}")))
    capsys.readouterr()
    for reason, one in cases:
        assert choose_encoder("auto", one, ["some text"]) is one
        assert capsys.readouterr().out == f"encoder: sentencepiece (gigatoken: {reason})\n"
        with pytest.raises(LimeError, match=f"--encoder gigatoken: gigatoken: {reason}; use --encoder sentencepiece"):
            choose_encoder("gigatoken", one, ["some text"])
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert choose_encoder("auto", trained, ["some text"]) is trained
    assert "it is not installed; pip install 'lime_dist[fast]'" in capsys.readouterr().out
    with pytest.raises(LimeError, match="--encoder gigatoken: gigatoken: it is not installed"):
        choose_encoder("gigatoken", trained, ["some text"])
