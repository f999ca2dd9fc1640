"""Protects how the content of hub datasets is fetched: few requests, flat memory, once; and what outages and kills leave behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub import Fault, Hub
from support.hub_client import NAME, README, read, run, shards

from data_tools.pretokenize import manifest
from data_tools.sources import hub_file
from data_tools.sources.documents import documents, read_file
from data_tools.sources.hub_file import HubFile, blocks
from data_tools.sources.hub_requests import PatientClient
from data_tools.sources.inputs import RemoteDamage, list_inputs
from data_tools.sources.tally import Tally
from data_tools.tokenizer import training
from data_tools.tokenizer.__main__ import main as tokenizer
from lime_dist.errors import LimeError

B = "data/CC-2/b.parquet"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bytes of a block, such that every file has several. Footers come with the last 64 KiB."""
    for name, size in (("BLOCK", 8192), ("FIRST_BLOCK", 4096), ("HOLE", 512)):
        monkeypatch.setattr(hub_file, name, size)
    return 8192


def test_requests_of_a_gigabyte() -> None:
    """Row groups as FineWeb-Edu's: 1000 rows, 2.4 MB of compressed text, and 150 KB of other columns."""
    text, others, groups = 2_400_000, 150_000, 400
    starts = [group * (text + others) for group in range(groups)]
    asked = blocks((first, first + text) for first in starts)
    size = sum(end - first for first, end in asked)
    assert 1e9 < size < 1.03e9 and len(asked) <= 33 and max(end - first for first, end in asked) == 32 << 20
    assert asked[0][0] == 0 and all(end == first for (_, end), (first, _) in zip(asked, asked[1:], strict=False))
    apart = blocks((group << 24, (group << 24) + text) for group in range(groups))
    assert sum(end - first for first, end in apart) == groups * text, "large holes are not fetched"
    generator = np.random.default_rng(0)
    for _ in range(50):  # every wanted byte is in exactly one block
        borders = sorted(generator.integers(0, 200 << 20, size=12).tolist())
        wanted = list(zip(borders[::2], borders[1::2], strict=True))
        asked = blocks(wanted)
        assert all(first < end <= other for (first, end), (other, _) in zip(asked, asked[1:], strict=False))
        for first, end in wanted:
            inside = sum(max(0, min(end, b) - max(first, a)) for a, b in asked)
            assert inside == end - first


def test_empty_files_and_row_groups_have_no_rows(hub: Hub, data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data / B)
    pq.write_table(table[:0], data / "data/CC-1/empty.parquet")
    with pq.ParquetWriter(data / B, table.schema) as writer:
        for piece in (table[:10], table[:0], table[10:]):
            writer.write_table(piece)
    hub.commit(data)
    assert read(f"hub:{NAME}") == read(str(data / "data")) and len(read(f"hub:{NAME}")) == 600


FIRST_REQUESTS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from data_tools.sources import hub_requests
import huggingface_hub

both, told = Barrier(2), huggingface_hub.get_session
def slowly():  # until both threads have seen the client of the library
    client = told()
    if not isinstance(client, hub_requests.PatientClient):
        try:
            both.wait(1)
        except Exception:
            pass
    return client
huggingface_hub.get_session = slowly

def first(_):
    hub_requests.use_patient_client()
    return told()

with ThreadPoolExecutor(2) as threads:
    one, other = threads.map(first, range(2))
assert one is other is told() and not one.is_closed
"""


def test_two_threads_may_make_the_first_requests() -> None:
    """Each took the library's client for its own to replace, which closed that of the other."""
    finished = subprocess.run([sys.executable, "-c", FIRST_REQUESTS], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_content_comes_in_blocks_and_memory_is_flat(
    hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: int
) -> None:
    held, take = list[int](), HubFile._take

    def recording(self: HubFile, number: int) -> bytes:
        content = take(self, number)
        held.append(self.held_bytes)
        return content

    monkeypatch.setattr(HubFile, "_take", recording)
    assert read(f"hub:{NAME}") == read(str(data / "data"))
    sizes = [(data / "data/CC-1/a.parquet").stat().st_size, (data / B).stat().st_size]
    assert 2 * small_blocks < max(set(held) - {1 << 16}) <= 3 * small_blocks, "apart from the footers"
    expected = sum(2 + -(-(size - 4096) // small_blocks) for size in sizes)
    assert expected - 2 <= hub.count("/content/") <= expected + 2 and hub.sent < sum(sizes) + 2 * (1 << 16) + 1000
    assert hub.count("/resolve/.*parquet") == 2


def test_only_wanted_columns_are_fetched(hub: Hub, data: Path, small_blocks: int) -> None:
    texts = [f"text {i}" for i in range(200)]
    columns = {"other": [f"{i}" * 20000 for i in range(200)], "score": [1.0] * 200, "text": texts}
    pq.write_table(pa.table(columns), data / B, row_group_size=20, compression="none", use_dictionary=False)
    hub.commit(data)
    file = next(file for file in list_inputs(f"hub:{NAME}") if file.name == B)
    assert [text for _, text in read_file(file, "text", Tally())] == texts
    assert hub.sent < (data / B).stat().st_size / 4


def test_a_stalled_connection_is_given_up(hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.5")
        huggingface_hub.set_client_factory(PatientClient)  # a new client, with this time-out
        hub.faults.append(Fault("stall"))
        assert read(f"hub:{NAME}:sample-10BT") == read(str(data / "sample")) and not hub.faults[0].times
    huggingface_hub.set_client_factory(PatientClient)


def test_a_signed_address_is_renewed_when_it_has_expired(
    hub: Hub, data: Path, pauses: list[float], small_blocks: int
) -> None:
    hub.uses = 5
    assert read(f"hub:{NAME}") == read(str(data / "data"))
    assert hub.expired >= 3 and not pauses and not hub.leaked_tokens
    assert hub.count("/resolve/.*parquet") <= 2 + 2 * hub.expired, "two requests may be under way"


def test_a_hub_that_is_gone_for_minutes(
    hub: Hub, data: Path, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    files = list_inputs(f"hub:{NAME}:sample-10BT")
    hub.faults.append(Fault("gone", ".", times=11))
    texts = [text for *_, text in documents(files, "text", Tally())]
    assert texts == read(str(data / "sample")) and 300 < sum(pauses) < 600
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "000.parquet: " in said and ", 7 times; still trying" in said
    hub.faults.append(Fault("gone", "/content/", times=99))
    hub_file.forget_footers()
    with pytest.raises(
        LimeError, match=", 13 times; try again .*; finished shards are kept, run the same command again"
    ):
        list(documents(files, "text", Tally()))


@pytest.mark.parametrize("where", ["/revision/", "README", "/tree/"])
def test_a_failure_never_brings_an_old_commit_back(hub: Hub, data: Path, pauses: list[float], where: str) -> None:
    """What the libraries have in their caches is older than the dataset."""
    list_inputs(f"hub:{NAME}:sample-10BT")
    (data / "README.md").write_text(README.replace("sample/10BT/*", "sample/11BT/*"))
    (data / "sample/11BT").mkdir()
    (data / "sample/10BT/000.parquet").rename(data / "sample/11BT/001.parquet")
    hub.commit(data)
    hub.faults.append(Fault("status", where, times=1))
    (file,) = list_inputs(f"hub:{NAME}:sample-10BT")
    assert file.name == "sample/11BT/001.parquet" and hub.main in file.path and pauses == [1.0]
    (data / "README.md").write_text(README + "once more")
    hub.commit(data)
    hub.faults.append(Fault("status", where, times=99))
    with pytest.raises(LimeError, match="status 503, 7 times"):
        list_inputs(f"hub:{NAME}:sample-10BT")


def test_lines_are_compared_with_the_sha256_of_their_file(hub: Hub, data: Path, small_blocks: int) -> None:
    lines = [json.dumps({"text": f"line {i} {'x' * 30}"}) for i in range(1000)]
    (data / "data/CC-2/large.jsonl").write_text("\n".join(lines))
    hub.commit(data)
    file = next(file for file in list_inputs(f"hub:{NAME}") if file.name.endswith("jsonl"))
    hub.faults.append(Fault("flip", "/content/.*large"))
    with pytest.raises(RemoteDamage, match="large.jsonl: has arrived damaged .its content has not the SHA-256"):
        list(read_file(file, "text", Tally()))
    assert [text for _, text in read_file(file, "text", Tally())] == [json.loads(line)["text"] for line in lines]


KILLED = """
import os, signal, sys
from data_tools.pretokenize.__main__ import main
from data_tools.pretokenize.pool import UnitPool

run = UnitPool.run

def killed(self, units, todo, publish):
    results = []
    def publish_and_die(result):
        publish(result)
        results.append(result)
        if self._description == sys.argv[1] and len(results) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return run(self, units, todo, publish_and_die)

UnitPool.run = killed
main(sys.argv[2:])
"""
"""Runs pretokenize and kills it after two units of a phase."""


def test_kills_while_hashing_and_while_encoding(
    hub: Hub, data: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of a local copy, and nothing that is here is asked for again."""
    table = pq.read_table(data / B)
    pq.write_table(pa.concat_tables([table, table[:40]]), data / B, row_group_size=20, write_page_checksum=True)
    hub.commit(data)
    options = ["--drop-duplicates", "--validation-fraction", "0.1"]
    local = run(data / "data", tokenizer_folder, tmp_path / "local", *options)
    output, before = tmp_path / "remote", list[int]()
    for phase in ("hashing", "pretokenize"):
        command = [
            sys.executable, "-c", KILLED, phase, "--input", f"hub:{NAME}", "--tokenizer", str(tokenizer_folder),
            "--output", str(output), "--workers", "1", "--shard-tokens", "20000", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        before.append(hub.count(f"/content/.*/{B}"))
    assert list(output.glob(".duplicates/*.arrow")) and (output / "units.ndjson").read_bytes().count(b"\n") == 3

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is hashed again")

    monkeypatch.setattr(manifest, "sha256_file", refuse)
    remote = run(f"hub:{NAME}", tokenizer_folder, output, *options)
    assert hub.count(f"/content/.*/{B}") == before[1], "its texts and its footer are known"
    assert shards(output) == shards(tmp_path / "local") and remote["counts"] == local["counts"]
    assert remote["counts"]["duplicates"] == 40
    assert sorted(path.name for path in output.glob(".*")) == [".lock"]


def test_dropping_duplicates_fetches_nothing_twice(
    hub: Hub, data: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """The parent asks for signed addresses, once; workers take them from it."""
    requests = []
    for name, options in (("all", []), ("once", ["--drop-duplicates"])):
        before = len(hub.requests)
        hub_file.forget_footers()
        run(f"hub:{NAME}", tokenizer_folder, tmp_path / name, *options)
        asked = [path for path in hub.requests[before:] if ".parquet" in path]
        requests.append(sorted(path for path in asked if "/content/" in path))
        assert sum("/resolve/" in path for path in asked) <= 2, "the second run still has them"
    assert requests[0] == requests[1] and shards(tmp_path / "all") == shards(tmp_path / "once")
    assert hub.count("/resolve/.*parquet") == 2


def test_a_tokenizer_is_trained_on_files_spread_over_a_dataset(
    hub: Hub, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "SAMPLED_FILES", 3)
    generator = np.random.default_rng(0)
    for number in range(12):
        texts = [" ".join(map(str, generator.integers(0, 10**6, size=30))) for _ in range(40)]
        pq.write_table(pa.table({"text": texts}), data / f"data/CC-1/{number:02d}.parquet", row_group_size=10)
    hub.commit(data)

    def train(name: str, *options: str) -> tuple[list[str], str, str]:
        hub.requests.clear()
        hub_file.forget_footers()
        given = ["--input", f"hub:{NAME}", "--output", str(tmp_path / name), "--vocab-size", "290", *options]
        tokenizer(["train", *given])
        asked = {path.rsplit("/", 1)[1] for path in hub.requests if "/content/" in path}
        return sorted(asked), capsys.readouterr().out, (tmp_path / name / "tokenizer.model").read_bytes().hex()

    names = sorted(path.name for path in (data / "data").glob("*/*"))
    asked, said, model = train("first")
    assert [names.index(name) * 3 // len(names) for name in asked] == [0, 1, 2], "one of each third"
    assert "hub: 3 of 14 files are sampled, from data/CC-1/" in said and "(--seed 0)" in said
    assert train("again")[::2] == (asked, model)
    assert train("other", "--seed", "1")[0] != asked
