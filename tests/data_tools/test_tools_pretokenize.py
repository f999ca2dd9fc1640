"""Protects pretokenization: any number of workers and kills gives the same bytes, and shards hold what they should."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.crashes import TAILS

from data_tools import inspect
from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.pretokenize.encoding import split_of
from data_tools.pretokenize.manifest import Manifest
from data_tools.pretokenize.units import plan_units
from data_tools.sources.__main__ import main as sources
from data_tools.sources.documents import documents
from data_tools.sources.inputs import list_inputs
from data_tools.sources.tally import Tally
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.__main__ import main as tokenizer
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.files import lock_folder
from lime_dist.data.indexed import IndexedDataset
from lime_dist.errors import LimeError, run_command

SETTINGS = ["--validation-fraction", "0.1", "--shard-tokens", "3000"]


def arguments(given: Path, tokenizer_folder: Path, output: Path, *options: str) -> list[str]:
    return ["--input", str(given), "--tokenizer", str(tokenizer_folder), "--output", str(output), *SETTINGS, *options]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dataset(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, pretokenized by one worker."""
    folder = tmp_path_factory.mktemp("dataset") / "shards"
    pretokenize(arguments(corpus, tokenizer_folder, folder, "--workers", "1"))
    return folder


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    shutil.copytree(dataset, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_document_occurs_once_in_its_split_and_in_order(dataset: Path, corpus: Path, trained: Tokenizer) -> None:
    facts = json.loads((dataset / "dataset.json").read_text())
    texts = [text for *_, text in documents(list_inputs(str(corpus)), "text", Tally())]
    for split in ("train", "validation"):
        expected = [text for text in texts if split_of(text.encode(), 0.1) == split]
        listed, decoded = facts["splits"][split], list[str]()
        for shard in listed["shards"]:
            data = IndexedDataset(dataset / shard["name"])
            assert shard["tokens"] <= 3000 or shard["documents"] == 1
            for i in range(len(data)):
                ids = data.document(i)
                assert ids[-1] == trained.eos_id and trained.eos_id not in ids[:-1]
                decoded.append(trained.decode(ids[:-1]))
        assert decoded == expected and listed["documents"] == len(expected) == TokenSplit(dataset, split).num_documents
        assert listed["text_bytes"] == sum(len(text.encode()) for text in expected)
        assert listed["tokens"] == TokenSplit(dataset, split).num_tokens
    assert facts["counts"] == {
        "rows": 320, "null": 0, "empty": 0, "filtered": 0, "duplicates": 0, "rejected": 0
    }  # fmt: skip
    assert (facts["vocab_size"], facts["eos_id"], facts["tokenizer_hash"]) == (500, 2, trained.hash)
    assert 10 < facts["splits"]["validation"]["documents"] < 60
    assert Tokenizer(dataset / "tokenizer").hash == trained.hash


def test_two_workers_write_the_same_bytes(
    dataset: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "two"
    pretokenize(arguments(corpus, tokenizer_folder, output, "--workers", "2"))
    assert content(output) == content(dataset)
    capsys.readouterr()
    pretokenize(arguments(corpus, tokenizer_folder, output))
    assert "complete, reused" in capsys.readouterr().out
    assert content(output) == content(dataset)


def children(pid: int) -> list[int]:
    """The process ids of a run's workers, recognised by their command lines."""
    workers = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            workers.append(int(child))
    return workers


def start_and_wait_for_units(command: list[str], output: Path, more: int) -> subprocess.Popen[str]:
    """Start a run and return when ``more`` further units are recorded."""

    def recorded() -> int:
        path = output / "units.ndjson"
        return path.read_bytes().count(b"\n") if path.exists() else 1

    before = recorded()
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while recorded() < before + more and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert run.poll() is None and recorded() >= before + more
    return run


def test_finished_units_survive_killed_workers_and_parents(
    dataset: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "killed"
    given = arguments(corpus, tokenizer_folder, output, "--workers", "2")
    command = [sys.executable, "-m", "data_tools.pretokenize", *given]
    run = start_and_wait_for_units(command, output, more=2)
    victim = children(run.pid)[0]
    os.kill(victim, signal.SIGKILL)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 2 and "Traceback" not in errors
    assert re.search(rf"error: worker process {victim} died at unit \d+ \(.*\): it was killed by SIGKILL", errors), (
        errors
    )
    run = start_and_wait_for_units(command, output, more=2)
    orphans = children(run.pid)
    run.kill()
    run.wait()
    assert orphans and not (output / "dataset.json").exists()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{orphan}").exists() for orphan in orphans) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{orphan}").exists() for orphan in orphans)
    with open(output / "units.ndjson", "ab") as file:
        file.write(b'{"unit": 3, "ro')  # a line that the kill cut short
    damaged = next(output.glob("train-*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\0\1")  # and a finished shard with changed content
    pretokenize([*given, "--verify"])
    assert "units are finished; continuing with the rest" in capsys.readouterr().out
    assert content(output) == content(dataset)
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\0\1")
    pretokenize([*given, "--verify"])
    assert f"no longer complete: {damaged}: its SHA-256 differs" in capsys.readouterr().out
    assert content(output) == content(dataset)


def test_a_kill_during_the_final_clean_up_leaves_nothing_behind(
    corpus: Path, tokenizer_folder: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dataset is complete, but the hashes of its documents still exist."""
    before = content(copy)
    (copy / ".duplicates").mkdir()
    (copy / ".duplicates/00003.npy").write_bytes(b"hashes")
    pretokenize(arguments(corpus, tokenizer_folder, copy, "--workers", "1"))
    assert "dataset complete, reused" in capsys.readouterr().out
    assert content(copy) == before and not (copy / ".duplicates").exists()


def test_a_kill_while_a_small_file_is_written_leaves_nothing_behind(
    corpus: Path, tokenizer_folder: Path, copy: Path
) -> None:
    before = content(copy)
    for name in (".units.ndjson.1234.tmp", "tokenizer/.tokenizer.model.1234.tmp"):
        (copy / name).write_bytes(b"half a file")
    pretokenize(arguments(corpus, tokenizer_folder, copy, "--workers", "1"))
    assert content(copy) == before


KILLS = 10


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Kills of a worker, the parent, or all at once, in any phase including de-duplication, with 1, 2 or 3 workers. The moments
    follow from how long this machine takes for a run; after the last kill, runs end by themselves."""
    generator = random.Random(0)
    options = ["--drop-duplicates", "--shuffle", "5", "--test-fraction", "0.1"]

    def start(output: Path, workers: int) -> subprocess.Popen[str]:
        given = arguments(corpus, tokenizer_folder, output, "--workers", str(workers), *options)
        command = [sys.executable, "-m", "data_tools.pretokenize", *given]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    begin = time.monotonic()
    whole = start(tmp_path / "whole", 1)
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    duration = time.monotonic() - begin
    expected, kills, outputs = content(tmp_path / "whole"), 0, 0
    while kills < KILLS:
        output, outputs = tmp_path / f"killed-{outputs}", outputs + 1
        while True:
            run = start(output, generator.randint(1, 3))
            if kills < KILLS:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(generator.uniform(0.2, 1.2) * duration)
                workers = children(run.pid) if run.poll() is None else []
                whom = generator.choice(["worker", "parent", "all"])
                if run.poll() is None and (workers or whom != "worker"):
                    kills += 1
                    if whom == "worker":
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(generator.choice(workers), signal.SIGKILL)
                    elif whom == "parent":
                        run.kill()
                    else:
                        os.killpg(run.pid, signal.SIGKILL)
            _, errors = run.communicate(timeout=180)  # a busy machine takes a while
            # Starting a child prints a traceback if the parent is killed meanwhile.
            assert "Traceback" not in errors or run.returncode < 0, errors
            if run.returncode == 0:
                break
        assert content(output) == expected
    assert outputs > 1


@pytest.mark.slow
def test_a_real_full_disk(
    dataset: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished shards stay intact; with more space, the same command finishes with the same bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        given = arguments(corpus, tokenizer_folder, disk / "out", "--workers", "2")
        with pytest.raises(LimeError, match="No space left on device; finished shards are kept"):
            pretokenize(given)
        assert not list((disk / "out").glob(".scratch*")) and not (disk / "out" / "dataset.json").exists()
        finished = {path.name: path.read_bytes() for path in (disk / "out").glob("*.bin")}
        assert finished and all((dataset / name).read_bytes() == data for name, data in finished.items())
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        capsys.readouterr()
        pretokenize(given)
        assert "units are finished; continuing with the rest" in capsys.readouterr().out
        assert content(disk / "out") == content(dataset)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_document_of_fifty_megabytes(tokenizer_folder: Path, trained: Tokenizer, tmp_path: Path) -> None:
    line = "A line of a very long document, written again and again, 1234567890. "
    text = line * (50_000_000 // len(line))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    pretokenize(arguments(tmp_path / "long.jsonl", tokenizer_folder, tmp_path / "out", "--workers", "1"))
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    shards = [shard for split in facts["splits"].values() for shard in split["shards"]]
    documents = [IndexedDataset(tmp_path / "out" / shard["name"]).document(0) for shard in shards]
    assert sorted(len(trained.decode(ids)) for ids in documents) == [5, len(text)]
    assert facts["counts"]["rejected"] == 0


def test_a_full_disk_keeps_finished_shards(
    dataset: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, publish = tmp_path / "full", Manifest.publish

    def fill(self: Manifest, result: dict[str, object], scratch: Path) -> None:
        if len(list(output.glob("*.idx"))) >= 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(output))
        publish(self, result, scratch)

    given = arguments(corpus, tokenizer_folder, output, "--workers", "1")
    with monkeypatch.context() as patch, pytest.raises(LimeError, match="No space left on device; finished shards"):
        patch.setattr(Manifest, "publish", fill)
        pretokenize(given)
    assert len(list(output.glob("*.idx"))) >= 6 and not list(output.glob(".scratch*"))
    pretokenize(given)
    assert content(output) == content(dataset)


def test_a_complete_folder_that_lost_a_shard_is_repaired(
    dataset: Path, copy: Path, corpus: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = sorted(copy.glob("train-*.idx"))[1]
    victim.unlink()
    pretokenize(arguments(corpus, tokenizer_folder, copy, "--workers", "1"))
    assert f"no longer complete: {victim}: missing" in capsys.readouterr().out
    assert content(copy) == content(dataset)


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_what_a_crash_leaves_in_the_progress_file_is_dropped(
    copy: Path, dataset: Path, corpus: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], tail: bytes
) -> None:
    """The units around it are kept, and the result has the same bytes."""
    header, first, *others = (copy / "units.ndjson").read_bytes().splitlines()
    (copy / "units.ndjson").write_bytes(b"\n".join([header, first, tail, *others[1:]]))
    (copy / "dataset.json").unlink()
    pretokenize(arguments(corpus, tokenizer_folder, copy, "--workers", "1"))
    said = capsys.readouterr().out
    assert said.count("unreadable line(s) dropped") == 1
    assert f"{len(others)} of {1 + len(others)} units are finished" in said
    assert content(copy) == content(dataset)


@pytest.mark.parametrize("damage", [b"", b"\0" * 50, b"\xe2\x82", b'{"format": "lime'])
def test_a_damaged_description_or_header_is_written_again(
    copy: Path, dataset: Path, corpus: Path, tokenizer_folder: Path, damage: bytes
) -> None:
    (copy / "dataset.json").write_bytes(damage)
    pretokenize(arguments(corpus, tokenizer_folder, copy, "--workers", "1"))
    assert content(copy) == content(dataset)
    (copy / "dataset.json").unlink()
    units = (copy / "units.ndjson").read_bytes().splitlines()
    (copy / "units.ndjson").write_bytes(b"\n".join([damage, *units[1:]]))
    pretokenize(arguments(corpus, tokenizer_folder, copy, "--workers", "1"))
    assert content(copy) == content(dataset)


@pytest.mark.parametrize("damage", [b"", b"\0" * 50, "half"])
def test_damaged_hashes_of_an_interrupted_run_are_made_again(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | str
) -> None:
    options = ["--workers", "1", "--drop-duplicates"]
    pretokenize(arguments(corpus, tokenizer_folder, tmp_path / "whole", *options))

    def interrupted(*_: object) -> None:
        raise LimeError("interrupted")

    with monkeypatch.context() as patch, pytest.raises(LimeError, match="interrupted"):
        patch.setattr(Manifest, "publish", interrupted)
        pretokenize(arguments(corpus, tokenizer_folder, tmp_path / "cut", *options))
    victim = tmp_path / "cut/.duplicates/00000.npy"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2] if isinstance(damage, str) else damage)
    pretokenize(arguments(corpus, tokenizer_folder, tmp_path / "cut", *options))
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_other_settings_or_inputs_in_a_used_folder_are_refused(
    copy: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(LimeError, match=r"was made with bos=False \(now True\); give another --output, or --fresh"):
        pretokenize(arguments(corpus, tokenizer_folder, copy, "--bos"))
    with pytest.raises(LimeError, match=r"other input files \(a.parquet, inner/b.parquet differ\)"):
        pretokenize(arguments(corpus / "c.jsonl", tokenizer_folder, copy))
    (copy / "dataset.json").unlink()  # also for an unfinished dataset
    with pytest.raises(LimeError, match="was made with bos=False"):
        pretokenize(arguments(corpus, tokenizer_folder, copy, "--bos"))
    given = arguments(corpus / "c.jsonl", tokenizer_folder, copy, "--fresh", "--bos", "--workers", "1")
    pretokenize(given)
    data = IndexedDataset(copy / "train-00000-00")
    assert data.document(0)[0] == 1 and data.document(0)[-1] == 2
    facts = json.loads((copy / "dataset.json").read_text())
    assert {path.stem for path in copy.glob("*-*.bin")} == {
        shard["name"] for split in facts["splits"].values() for shard in split["shards"]
    }


def test_a_second_run_into_the_same_folder_is_refused(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(LimeError, match="another run is writing here"):
        pretokenize(arguments(corpus, tokenizer_folder, tmp_path))


def test_bad_input_is_counted_reported_and_limited(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, output = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    shutil.copy(corpus / "a.parquet", given)
    (given / "b.parquet").write_bytes(b"PAR1")
    good = [json.dumps({"text": f"line {i}"}).encode() for i in range(20)]
    bad = [b'{"text": "\xff"}', b'{"text": null}', b'{"text": " "}', b'{"other": "x"}']
    (given / "c.jsonl").write_bytes(b"\n".join(good[:10] + bad + good[10:]))

    def attempt(*options: str) -> None:
        pretokenize(arguments(given, tokenizer_folder, output, "--workers", "1", *options))

    with pytest.raises(LimeError, match=r"b.parquet: not readable as parquet.*--on-error skip"):
        attempt("--on-error", "stop")
    with pytest.raises(LimeError, match=r"2 of 144 rows were rejected and 1 of 3 files could not be read to their end"):
        attempt()
    assert not (output / "dataset.json").exists()
    capsys.readouterr()
    attempt("--max-rejected", "0.5")
    output_text = capsys.readouterr().out
    assert "rejected: b.parquet: not readable" in output_text and "rejected: c.jsonl row 11: not UTF-8" in output_text
    assert "rejected: c.jsonl row 14: no column 'text', it has other" in output_text
    facts = json.loads((output / "dataset.json").read_text())
    assert (
        facts["counts"] == {"rows": 144, "null": 1, "empty": 1, "filtered": 0, "duplicates": 0, "rejected": 2}
        and len(facts["rejected"]) == 3
    )
    assert sum(split["documents"] for split in facts["splits"].values()) == 120 + 20


def test_input_without_text_is_refused_before_anything_is_written(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(LimeError, match=r"no text found; first error: in.jsonl row 1: no column 'text'"):
        pretokenize(arguments(tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*-*"))


def test_units_depend_only_on_the_input_and_cover_it(corpus: Path) -> None:
    units = plan_units(list_inputs(str(corpus)), "text", 3000)
    assert len(units) > 10 and [unit.index for unit in units] == list(range(len(units)))
    groups = [
        (file.name, group) for unit in units for file, part in unit.parts for group in (range(*part) if part else [-1])
    ]
    expected = [("a.parquet", i) for i in range(60)] + [("c.jsonl", -1)]
    assert groups == expected + [("inner/b.parquet", i) for i in range(60)]


def test_the_split_is_by_text_and_close_to_the_fraction() -> None:
    texts = [f"document {i}".encode() for i in range(20000)]
    share = np.mean([split_of(text, 0.05) == "validation" for text in texts])
    assert abs(share - 0.05) < 0.008
    small = {text for text in texts if split_of(text, 0.01) == "validation"}
    assert small < {text for text in texts if split_of(text, 0.05) == "validation"}
    assert not [text for text in texts if split_of(text, 0.0) == "validation"]


def test_inspect_shows_and_verifies(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.main([str(dataset), "--verify"])
    output_text = capsys.readouterr().out
    for words in (
        "files have the size and SHA-256",
        "tokens per byte",
        "document lengths in tokens",
        "document 0: Doc",
    ):
        assert words in output_text


def test_a_tampered_shard_is_caught_by_verify(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = sorted(copy.glob("validation-*.bin"))[-1]
    data = bytearray(victim.read_bytes())
    data[4] ^= 1
    victim.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: inspect.main([str(copy), "--verify"]))
    assert stop.value.code == 2 and f"error: {victim}: its SHA-256 differs" in capsys.readouterr().err


@pytest.mark.parametrize("command", [sources, tokenizer, pretokenize, inspect.main])
def test_help_has_an_example(command: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    assert stop.value.code == 0 and "example:\n  python -m data_tools." in capsys.readouterr().out


def test_exit_status_of_the_command(dataset: Path, tmp_path: Path) -> None:
    def status(*given: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", *given], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    code, errors = status("data_tools.inspect", str(tmp_path / "nowhere"))
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert status("data_tools.inspect", str(dataset))[0] == 0
