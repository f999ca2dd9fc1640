"""Protects reading: damage costs only the rows that it hits and is reported with file and row; nothing is dropped silently."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.sources import embedded
from data_tools.sources.__main__ import main
from data_tools.sources.documents import documents
from data_tools.sources.inputs import fingerprint, list_inputs, row_group_bytes
from data_tools.sources.tally import Tally
from lime_dist.errors import LimeError


def write_parquet(path: Path, column: dict[str, Any], rows: int = 2) -> None:
    pq.write_table(pa.table(column), path, row_group_size=rows, write_page_checksum=True, compression="none")


def read(given: Path | str) -> tuple[list[tuple[str, int, str]], Tally]:
    tally = Tally()
    return list(documents(list_inputs(str(given)), "text", tally)), tally


def test_folder_glob_and_file_give_documents_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.jsonl").write_text('{"text": "hidden"}\n')
    write_parquet(tmp_path / "b.parquet", {"text": ["b1", "b2", "b3"]})
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": "a3"}')
    with gzip.open(tmp_path / "z" / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "c1"}\n')
    (tmp_path / "notes.txt").write_text("no input")
    everything = [
        ("a.jsonl", 1, "a1"),
        ("a.jsonl", 3, "a3"),
        ("b.parquet", 1, "b1"),
        ("b.parquet", 2, "b2"),
        ("b.parquet", 3, "b3"),
        ("z/c.jsonl.gz", 1, "c1"),
    ]
    assert read(tmp_path)[0] == everything
    assert read(f"{tmp_path}/**/*.*")[0] == everything
    assert read(tmp_path / "a.jsonl")[0] == everything[:2]
    for given, message in [("nowhere", "no such file or folder"), ("notes.txt", "give text in one of these formats")]:
        with pytest.raises(LimeError, match=message):
            list_inputs(str(tmp_path / given))


def test_bad_jsonl_lines_are_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "a byte order mark is not damage"}',
        b'{"text": "not utf-8: \xff"}',
        b'{"text": "cut off',
        b'{"other": 1}',
        b'["text"]',
        b'{"text": 7}',
        b'{"text": "\\ud800"}',
        b'{"text": null}',
        b'{"text": "  \\n\\t "}',
        b'{"text": ""}',
        '{"text": "the last, ünïcode"}'.encode(),
    ]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    rows, tally = read(tmp_path)
    assert [row for _, row, _ in rows] == [1, 11] and rows[-1][2] == "the last, ünïcode"
    assert (tally.rows, tally.null, tally.empty) == (11, 1, 2)
    messages = [str(rejection) for rejection in tally.rejected]
    expected = [
        "not UTF-8",
        "not JSON",
        "no column 'text', it has other",
        "not a JSON object",
        "holds int",
        "surrogate",
    ]
    assert len(messages) == len(expected)
    for row, (line, words) in enumerate(zip(messages, expected, strict=True), start=2):
        assert line.startswith(f"bad.jsonl row {row}: ") and words in line


def test_a_truncated_gzip_file_is_read_up_to_the_damage(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"line {i} " + "x" * 50}) + "\n" for i in range(2000))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-200])
    rows, tally = read(tmp_path)
    assert 0 < len(rows) < 2000 and rows[0][2].startswith("line 0")
    assert "t.jsonl.gz row" in str(tally.rejected[-1]) and "cannot be read from here on" in str(tally.rejected[-1])


def test_a_damaged_row_group_costs_only_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_parquet(path, {"text": [f"text number {i} {'y' * 40}" for i in range(6)]})
    data = bytearray(path.read_bytes())
    place = data.index(b"text number 2")
    data[place : place + 4] = b"XXXX"
    path.write_bytes(data)
    rows, tally = read(tmp_path)
    assert [row for _, row, _ in rows] == [1, 2, 5, 6] and tally.rows == 6
    (rejection,) = tally.rejected
    assert (rejection.row, rejection.rows) == (3, 2) and "p.parquet row 3: row group 1 is damaged" in str(rejection)


def test_a_parquet_row_with_invalid_utf8_costs_only_itself(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"bad \xff", b"fine", None, b" "], pa.binary()).view(pa.string())
    write_parquet(tmp_path / "p.parquet", {"text": raw}, rows=5)
    rows, tally = read(tmp_path)
    assert [text for *_, text in rows] == ["good", "fine"] and (tally.null, tally.empty) == (1, 1)
    assert [str(rejection) for rejection in tally.rejected] == ["p.parquet row 2: not UTF-8 (byte 4 of the text)"]


def test_invalid_parquet_and_missing_columns_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    write_parquet(tmp_path / "b.parquet", {"content": ["x", "y"]})
    write_parquet(tmp_path / "c.parquet", {"text": [1, 2]})
    write_parquet(tmp_path / "d.parquet", {"text": pa.array(["p", "q"]).dictionary_encode()})
    rows, tally = read(tmp_path)
    assert [text for *_, text in rows] == ["p", "q"]
    messages = [str(rejection) for rejection in tally.rejected]
    assert messages[0].startswith("a.parquet: not readable as parquet")
    assert messages[1:] == [
        "b.parquet: no column 'text', it has content",
        "c.parquet: column 'text' holds int64, not text",
    ]
    assert [rejection.rows for rejection in tally.rejected] == [0, 2, 2]


def test_a_fingerprint_depends_on_content_not_on_place_or_time(tmp_path: Path) -> None:
    for folder, content in [("one", b"same"), ("two", b"same"), ("three", b"more")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(content)
    prints = [fingerprint(list_inputs(str(tmp_path / folder))[0]) for folder in ("one", "two", "three")]
    assert prints[0] == prints[1] != prints[2] and prints[0]["name"] == "a.jsonl"


def test_docstrings_are_read_in_order_without_importing(tmp_path: Path) -> None:
    source = '"""Module."""\nraise SystemExit\ndef f():\n    """F\n       indented."""\n\nclass C:\n    """C."""\n'
    source += '    def m(self):\n        """M."""\n'
    (tmp_path / "m.py").write_text(source)
    assert embedded.read_source("p/m.py", str(tmp_path / "m.py")) == [("p.m", ["Module.", "F\nindented.", "C.", "M."])]
    (tmp_path / "bad.py").write_text('"""x"""\ndef')
    assert "SyntaxError" in str(embedded.read_source("bad.py", str(tmp_path / "bad.py")))


def test_the_embedded_corpus_is_distinct_repeatable_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = embedded.source_files()[:300]
    assert files[0][0] == "pydoc_data/topics.py"
    monkeypatch.setattr(embedded, "source_files", lambda: files)

    def gather(folder: Path, *options: str) -> str:
        main(["embedded", "--output", str(folder), "--max-megabytes", "0.9", *options])
        return capsys.readouterr().out

    one = tmp_path / "one"
    assert "embedded corpus written: 0.9 MB" in gather(one, "--workers", "1")
    assert "written" in gather(tmp_path / "two", "--workers", "2")
    names = sorted(path.name for path in one.iterdir())
    assert names == [".lock", "corpus.json", "embedded-00000.parquet"]
    for name in names:
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    rows = pq.read_table(one / names[-1]).to_pylist()
    fineweb = "text id dump url file_path language language_score token_count score int_score".split()
    assert list(rows[0]) == fineweb
    assert len({row["text"] for row in rows}) == len(rows) > 100
    assert all(row["token_count"] == len(row["text"].split()) and row["dump"] == "embedded" for row in rows)
    assert rows[0]["url"].startswith("pydoc_data.topics#") and any("#" not in row["url"] for row in rows)
    assert "complete, reused" in gather(one)
    (one / names[-1]).write_bytes((one / names[-1]).read_bytes()[:-1])
    assert "is missing or changed" in gather(one)
    assert (one / names[-1]).read_bytes() == (tmp_path / "two" / names[-1]).read_bytes()
    with pytest.raises(LimeError, match="made with --max-megabytes 0.9, not 2.0"):
        main(["embedded", "--output", str(one), "--max-megabytes", "2"])


def write_lines(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of ten documents, half of them on another disk: behind a link to a folder, and one to a file."""
    write_lines(tmp_path / "in" / "a.jsonl", *(f"a{i}" for i in range(5)))
    write_lines(tmp_path / "disk" / "deep" / "b.jsonl", "b0", "b1", "b2")
    write_lines(tmp_path / "disk" / "blob", "c0", "c1")
    (tmp_path / "in" / "inner").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "in" / "c.jsonl").symlink_to("../disk/blob")
    return tmp_path / "in"


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/**", "/**/*"])
def test_links_are_followed_and_each_file_is_read_once(
    linked: Path, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"a{i}" for i in range(5)] + ["b0", "b1", "b2", "c0", "c1"]
    given = f"{linked}{pattern}"
    assert sorted(text for *_, text in read(given)[0]) == texts and not capsys.readouterr().out
    (linked / "0.jsonl").symlink_to("a.jsonl")
    (linked / "twin").symlink_to("inner")
    rows, _ = read(given)
    assert sorted(text for *_, text in rows) == texts and {name for name, *_ in rows} >= {"a.jsonl", "c.jsonl"}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and f"{linked}/0.jsonl: is the file {linked}/a.jsonl, which is read once" in said


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/inner/*.jsonl"])
def test_what_cannot_be_read_is_an_error_that_names_it(
    linked: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken and circular links, folders without permission, pipes and sockets: never fewer documents without a word."""
    listdir, inner = os.listdir, linked / "inner"

    def refusal() -> str:
        with pytest.raises(LimeError) as refused:
            list_inputs(f"{linked}{pattern}")
        assert "\n" not in str(refused.value)
        return str(refused.value)

    def refuse(folder: Any = ".") -> list[str]:
        if Path(folder) == inner:
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        assert f"{inner}: cannot be read (Permission denied)" in refusal()
    for target, words in [("/disk/gone/d.jsonl", "No such file"), ("d.jsonl", "in a circle")]:
        (inner / "d.jsonl").symlink_to(target)
        assert f"{inner}/d.jsonl: a link to {target}" in (line := refusal()) and words in line
        (inner / "d.jsonl").unlink()
    os.mkfifo(inner / "p.jsonl")
    assert f"{inner}/p.jsonl: is a named pipe, not a file" in refusal()
    (inner / "p.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(inner)
        server.bind("s.jsonl")
        assert f"{inner}/s.jsonl: is a socket, not a file" in refusal()
    (inner / "s.jsonl").unlink()
    assert list_inputs(f"{linked}{pattern}")


def test_a_link_to_a_folder_that_contains_it_is_refused(linked: Path) -> None:
    for place, target in [(linked / "back", "."), (linked / "inner" / "up", str(linked.parent))]:
        place.symlink_to(target)
        for pattern in ("", "/**/*.jsonl"):
            with pytest.raises(LimeError, match=f"{place}.*: leads back to .*remove this link"):
                list_inputs(f"{linked}{pattern}")
        assert len(list_inputs(f"{linked}/*.jsonl")) == 2, "a pattern that does not meet it"
        place.unlink()
    os.mkfifo(linked / "notes")
    assert len(list_inputs(str(linked))) == 3, "what is not named as an input is left alone"
    for given, words in [
        ("gone.jsonl", "a link to nowhere"),
        ("pipe.jsonl", "is a named pipe"),
        ("no/*", "No such file"),
    ]:
        (linked / "gone.jsonl").unlink(missing_ok=True)
        (linked / "gone.jsonl").symlink_to("nowhere")
        (linked / "pipe.jsonl").exists() or os.mkfifo(linked / "pipe.jsonl")
        with pytest.raises(LimeError, match=words):
            list_inputs(str(linked / given))


def test_docstrings_behind_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some installers link packages instead of copying them."""
    (tmp_path / "cache" / "package").mkdir(parents=True)
    (tmp_path / "cache" / "package" / "m.py").write_text("")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "package").symlink_to("../cache/package")
    (tmp_path / "cache" / "package" / "back").symlink_to(tmp_path / "site")
    monkeypatch.setattr(
        embedded.sysconfig, "get_paths", lambda: dict.fromkeys(("stdlib", "purelib", "platlib"), str(tmp_path / "site"))
    )
    assert embedded.source_files() == [("package/m.py", str(tmp_path / "site" / "package" / "m.py"))]


def test_a_key_that_no_file_can_hold_costs_only_its_row(tmp_path: Path) -> None:
    """The reason of a rejection names the columns of the row, whatever they are: in one line that UTF-8 can encode."""
    keys = ["\ud800", "a\nb", "\x1b[31m", "k" * 5000]
    lines = [json.dumps({key: 1}) for key in keys] + [json.dumps({"text": "good", "\udfff": 1})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    rows, tally = read(tmp_path)
    assert [text for *_, text in rows] == ["good"] and len(tally.rejected) == len(keys)
    for rejection, key in zip(tally.rejected, ["\\ud800", "a\\nb", "\\x1b[31m", "kkk"], strict=True):
        assert key in rejection.reason and rejection.reason.isprintable() and len(rejection.reason.encode()) < 300


def test_a_parquet_file_without_usable_columns_is_one_line(tmp_path: Path) -> None:
    without = pa.RecordBatch.from_struct_array(pa.array([{}, {}], pa.struct([])))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    other = pa.Table.from_arrays([pa.array(["good"]), pa.array([1]), pa.array([2])], names=["text", "x", "x"])
    for name, table in [
        ("a", pa.table({})), ("b", pa.Table.from_batches([without])), ("c", twice), ("d", other),
        ("e", pa.table({"text": pa.nulls(3)})),
    ]:  # fmt: skip
        pq.write_table(table, tmp_path / f"{name}.parquet")
        assert row_group_bytes(list_inputs(str(tmp_path / f"{name}.parquet"))[0], "text") is not None
    rows, tally = read(tmp_path)
    assert rows == [("d.parquet", 1, "good")] and (tally.rows, tally.null) == (5, 3)
    assert [str(rejection) for rejection in tally.rejected] == [
        "a.parquet: no column 'text', it has none",
        "b.parquet: no column 'text', it has none",
        "c.parquet: 2 columns 'text'",
    ]


def test_file_names_that_are_not_utf8_are_read_and_recorded(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Also by commands whose standard output cannot show them, or anything else beyond ASCII."""
    folder = tmp_path / os.fsdecode(b"in \xff")
    folder.mkdir()
    for name in (b"\xfe.jsonl", b"b\xe4.jsonl"):
        write_lines(folder / os.fsdecode(name), *(f"text {i} of {name!r}" for i in range(200)))
    with open(folder / os.fsdecode(b"\xff.parquet"), "wb") as file:
        pq.write_table(pa.table({"text": ["p", "q"]}), file)
    (folder / os.fsdecode(b"bad\xff.jsonl")).write_text('{"\\ud800": 1}\n')
    output = tmp_path / os.fsdecode(b"out \xff")
    for command in (
        ["tokenizer", "train", "--input", folder, "--output", tmp_path / "tokenizer-\udcff", "--vocab-size", "300"],
        ["pretokenize", "--input", folder, "--output", output, "--tokenizer", tokenizer_folder, "--workers", "1"],
        ["inspect", output, "--verify"],
        ["merge", output, output, "--output", tmp_path / "merged \udcff"],
    ):
        module, *arguments = map(str, command)
        done = subprocess.run(
            [sys.executable, "-m", f"data_tools.{module}", *arguments],
            env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    description = json.loads((output / "dataset.json").read_bytes())
    assert description["counts"] == {
        "rows": 403, "null": 0, "empty": 0, "filtered": 0, "duplicates": 0, "rejected": 1
    }  # fmt: skip
    assert os.fsencode(description["inputs"][1]["name"]) == b"b\xe4.jsonl"
    assert os.fsencode(description["source"]) == os.fsencode(folder)
