"""Protects the selection of documents: conditions, duplicates, splits, and order within a shard."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.pretokenize import duplicates, pool
from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.pretokenize.encoding import split_of
from data_tools.pretokenize.pool import Progress
from data_tools.pretokenize.units import Selection, Unit
from data_tools.sources.documents import documents
from data_tools.sources.filters import Filter
from data_tools.sources.inputs import InputFile, list_inputs
from data_tools.sources.tally import Tally
from data_tools.tokenizer import Tokenizer
from lime_dist.data.indexed import IndexedDataset
from lime_dist.errors import LimeError

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tokenizer_folder: Path, tmp_path: Path) -> Run:
    """run(input, option, …, name="out") pretokenizes with one worker and returns dataset.json."""

    def call(given: object, *options: str, name: str = "out") -> dict[str, Any]:
        output = tmp_path / name
        common = ["--tokenizer", str(tokenizer_folder), "--output", str(output)]
        if "--workers" not in options:
            common += ["--workers", "1"]
        pretokenize(["--input", str(given), *common, *options])
        return json.loads((output / "dataset.json").read_text())

    return call


def texts_of(folder: Path, facts: dict[str, Any], split: str) -> list[str]:
    tokenizer = Tokenizer(folder / "tokenizer")
    texts = []
    for shard in facts["splits"][split]["shards"]:
        data = IndexedDataset(folder / shard["name"])
        texts += [tokenizer.decode(data.document(i)) for i in range(len(data))]
    return texts


def test_conditions_select_documents_in_both_formats(tmp_path: Path, run: Run) -> None:
    rows = [
        {"text": f"document {i}", "score": score, "language": language, "metadata": {"tokens": i}}
        for i, (score, language) in enumerate([(1.0, "en"), (3.0, "en"), (3.5, "de"), (4.0, "en"), (None, "en")])
    ]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    (tmp_path / "in" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--where score>=3 --where language=en --validation-fraction 0".split()
    facts = run(tmp_path / "in", *options)
    assert texts_of(tmp_path / "out", facts, "train") == ["document 1", "document 3"] * 2
    assert facts["counts"] == {
        "rows": 10, "null": 0, "empty": 0, "filtered": 6, "duplicates": 0, "rejected": 0
    }  # fmt: skip
    assert facts["settings"]["where"] == ["score>=3", "language=en"]
    nested = run(tmp_path / "in", "--where", "metadata.tokens < 2", "--validation-fraction", "0", name="nested")
    assert texts_of(tmp_path / "nested", nested, "train") == ["document 0", "document 1"] * 2
    with pytest.raises(LimeError, match="was made with where=.*give another --output, or --fresh"):
        run(tmp_path / "in", "--where", "score>=4")
    with pytest.raises(LimeError, match=r"no text found; 10 of 10 rows do not satisfy --where"):
        run(tmp_path / "in", "--where", "score>99", name="none")


def test_a_condition_that_cannot_be_checked_is_reported(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "language": ["en", "de"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "a", "language": "en"}\n{"text": "b", "language": 7}\n')
    tally = Tally()
    assert not list(documents(list_inputs(str(tmp_path)), "text", tally, (Filter.parse("score>=3"),)))
    has = "no column 'score' (--where score>=3), it has text, language"
    assert [str(rejection) for rejection in tally.rejected] == [
        f"a.parquet: {has}",
        f"b.jsonl row 1: {has}",
        f"b.jsonl row 2: {has}",
    ]
    tally = Tally()
    assert len(list(documents(list_inputs(str(tmp_path)), "text", tally, (Filter.parse("language=en"),)))) == 2
    (bad,) = tally.rejected
    assert str(bad) == "b.jsonl row 2: column 'language' holds int, which language=en cannot be compared with"


def test_of_equal_texts_the_first_is_kept(corpus: Path, tmp_path: Path, run: Run) -> None:
    """Across rows, files and formats, and independently of the number of workers."""
    given = tmp_path / "in"
    shutil.copytree(corpus, given)
    texts = [text for *_, text in documents(list_inputs(str(corpus)), "text", Tally())]
    again = [*texts[5:60], *texts[:40], "once", "twice", "twice"]
    (given / "z.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in again))
    options = ["--drop-duplicates", "--shard-tokens", "3000", "--validation-fraction", "0"]
    facts = run(given, *options)
    assert texts_of(tmp_path / "out", facts, "train") == [*texts, "once", "twice"]
    assert facts["counts"]["duplicates"] == 55 + 40 + 1 and facts["counts"]["rows"] == len(texts) + len(again)
    other = run(given, *options, "--workers", "2", name="two")
    assert other == facts and not list((tmp_path / "two").glob(".dup*"))


def test_hashes_are_compared_bucket_by_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small buckets find the same duplicates as a dictionary."""
    monkeypatch.setattr(duplicates, "BUCKET_DOCUMENTS", 50)
    generator, units, seen, expected = np.random.default_rng(0), [], set[str](), []
    shared = multiprocessing.get_context("spawn").RawArray("q", 1 + pool.COUNTERS * 7)
    for number in range(7):
        texts = [f"text {generator.integers(400)}" for _ in range(int(generator.integers(90)))]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        units.append(Unit(number, ((InputFile(str(tmp_path / f"{number}.jsonl"), f"{number}.jsonl"), None),), 1))
        expected.append([text in seen or seen.add(text) is not None for text in texts])
        task = duplicates.HashUnit(tmp_path, Selection("text"))
        assert task(units[-1], Progress(shared, number)) == number
    assert duplicates.find_duplicates(tmp_path, len(units)) == sum(map(sum, expected)) > 50
    marked = duplicates.Duplicates(tmp_path)
    assert [marked.of(unit).tolist() for unit in units] == expected
    (tmp_path / "3.jsonl").write_text(json.dumps({"text": "another text"}) + "\n")
    with pytest.raises(LimeError, match=r"unit 3 \(3.jsonl\): no longer has the \d+ documents"):
        list(marked.without(units[3], Selection("text"), Tally()))


def test_documents_keep_their_split_when_files_are_added(corpus: Path, tmp_path: Path, run: Run) -> None:
    options = ["--validation-fraction", "0.1", "--test-fraction", "0.2"]
    whole = run(corpus, *options)
    part = run(corpus / "a.parquet", *options, name="part")
    for split in ("train", "validation", "test"):
        few, many = (texts_of(tmp_path / name, facts, split) for name, facts in (("part", part), ("out", whole)))
        assert few and set(few) < set(many)
        assert all(split_of(text.encode(), 0.1, 0.2) == split for text in many)
    numbers = [split_of(f"{i}".encode(), 0.1, 0.2) for i in range(10000)]
    assert (
        abs(numbers.count("test") - 2000) < 160 and abs(numbers.count("validation") - 1000) < 120
    )  # four standard deviations
    with pytest.raises(LimeError, match="add up to less than 1"):
        run(corpus, "--validation-fraction", "0.5", "--test-fraction", "0.5", name="too-much")


def test_documents_of_a_shard_are_shuffled_by_seed(corpus: Path, tmp_path: Path, run: Run) -> None:
    options = ["--validation-fraction", "0", "--shard-tokens", "20000"]
    plain = run(corpus, *options)
    shuffled = run(corpus, *options, "--shuffle", "1", name="one")
    again = run(corpus, *options, "--shuffle", "1", "--workers", "2", name="again")
    other = run(corpus, *options, "--shuffle", "2", name="two")
    assert shuffled == again and shuffled["splits"] != other["splits"]
    for shard, mixed in zip(plain["splits"]["train"]["shards"], shuffled["splits"]["train"]["shards"], strict=True):
        one, two = (IndexedDataset(tmp_path / name / entry["name"]) for name, entry in (("out", shard), ("one", mixed)))
        documents_of = [[data.document(i).tobytes() for i in range(len(data))] for data in (one, two)]
        assert Counter(documents_of[0]) == Counter(documents_of[1])
    assert texts_of(tmp_path / "out", plain, "train") != texts_of(tmp_path / "one", shuffled, "train")
    with pytest.raises(LimeError, match="--shuffle takes a seed"):
        run(corpus, "--shuffle", "-1", name="bad")


def test_bos_and_eos_follow_the_options(corpus: Path, tmp_path: Path, run: Run, trained: Tokenizer) -> None:
    for name, options, first, last in [("neither", ["--no-eos"], False, False), ("bos", ["--bos"], True, True)]:
        facts = run(corpus / "c.jsonl", *options, name=name)
        data = IndexedDataset(tmp_path / name / facts["splits"]["train"]["shards"][0]["name"])
        ids = data.document(0)
        assert (ids[0] == trained.bos_id, ids[-1] == trained.eos_id) == (first, last)


def test_zstandard_in_several_frames_and_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(500))
    data = pa.Codec("zstd").compress(lines.encode(), asbytes=True)
    path.write_bytes(data + data)
    tally = Tally()
    assert [text for *_, text in documents(list_inputs(str(path)), "text", tally)] == [
        f"line {i}" for i in range(500)
    ] * 2
    path.write_bytes((data + data)[:-9])
    tally = Tally()
    assert 0 < len(list(documents(list_inputs(str(path)), "text", tally))) < 1000
    assert "cannot be read from here on" in str(tally.rejected[0])


def test_an_empty_validation_split_is_said(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20)))
    warning = (
        "warning: the validation split is empty; raise --validation-fraction, or train with train.evaluation_samples=0"
    )
    run(tmp_path / "in.jsonl", "--validation-fraction", "0.0001")
    assert warning in capsys.readouterr().out
    run(tmp_path / "in.jsonl", "--validation-fraction", "0.5", name="half")
    assert "warning" not in capsys.readouterr().out
