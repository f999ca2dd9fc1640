"""Protects reading from the Hugging Face hub: shards equal those of a local copy, whatever the network answers in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem
from support.hub import Fault, Hub
from support.hub_client import NAME, README, read, run, shards, use_hub

from data_tools.pretokenize.manifest import Manifest
from data_tools.sources.inputs import fingerprint, list_inputs
from lime_dist.errors import LimeError


def test_configurations_and_the_files_they_mean(hub: Hub, data: Path, pauses: list[float]) -> None:
    assert [file.name for file in list_inputs(f"hub:{NAME}:sample-10BT")] == ["sample/10BT/000.parquet"]
    files = list_inputs(f"hub:{NAME}")
    assert [file.name for file in files] == ["data/CC-1/a.parquet", "data/CC-2/b.parquet"]
    local = {file.name: fingerprint(file) for file in list_inputs(str(data))}
    assert [fingerprint(file) for file in files] == [local[file.name] for file in files], (
        "the hub's SHA-256, without a download"
    )
    assert read(f"hub:{NAME}@{hub.main}:sample-10BT") == read(str(data / "sample"))
    assert not hub.leaked_tokens and not pauses
    (data / "README.md").unlink()
    hub.commit(data)
    assert len(list_inputs(f"hub:{NAME}")) == 3, "without configurations all files"


def test_small_files_in_git_itself_are_read_whole_and_checked(hub: Hub, data: Path, pauses: list[float]) -> None:
    (data / "data/CC-3").mkdir()
    (data / "data/CC-3/c.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)))
    hub.commit(data)
    hub.faults.append(Fault("page", "jsonl", times=3))
    assert read(f"hub:{NAME}")[-5:] == [f"line {i}" for i in range(5)] and pauses == [1.0, 2.0, 4.0]


def test_a_local_folder_of_the_same_name_is_not_the_dataset(
    hub: Hub, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["another text"]}), tmp_path / NAME / "data" / "a.parquet")
    (tmp_path / NAME / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    assert len(read(f"hub:{NAME}")) == 600
    for given in (f"hub:{tmp_path / NAME}", "hub:./data", "hub:a/b/c"):
        with pytest.raises(LimeError, match="give hub:OWNER/NAME.*; for a folder of this machine leave out hub:"):
            list_inputs(given)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *((kind, "/content/") for kind in ("page", "whole", "short", "truncate", "reset", "gone", "status", "expired")),
        *(
            (kind, where)
            for kind in ("page", "status")
            for where in ("/resolve/.*parquet", "/tree/", "/revision/", "README")
        ),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_asked_again(
    hub: Hub, data: Path, pauses: list[float], kind: str, where: str
) -> None:
    hub.faults.append(Fault("status", where, 2, 403) if kind == "expired" else Fault(kind, where, times=2))
    assert read(f"hub:{NAME}:sample-10BT") == read(str(data / "sample"))
    assert hub.faults[0].times == 0 and pauses == [1.0, 2.0]


def test_a_rate_limit_is_waited_for(
    hub: Hub, data: Path, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for headers in ((("RateLimit", '"api";r=0;t=123'),), (("Retry-After", "7"),), ()):
        hub.faults.append(Fault("status", "/tree/", status=429, headers=headers))
    assert len(list_inputs(f"hub:{NAME}")) == 2
    assert pauses == [124.0, 8.0, 60.0]
    assert "hub: the rate limit is used up; waiting 124 s for its reset" in capsys.readouterr().err
    hub.faults.append(Fault("status", "/tree/", status=429, headers=(("Retry-After", "400"),), times=9))
    with pytest.raises(LimeError, match="rate limit is used up; set HF_TOKEN"):
        list_inputs(f"hub:{NAME}")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("hub:no/body", "RepoNotFound; there is no such dataset, or it needs a token with access: set HF_TOKEN"),
        (f"hub:{NAME}@gone", "RevisionNotFound; check the name, the revision and the configuration"),
        (f"hub:{NAME}:none", "BuilderConfig 'none' not found. Available: ['default', 'sample-10BT']; check"),
    ],
)
def test_what_does_not_exist_ends_at_once(hub: Hub, pauses: list[float], given: str, says: str) -> None:
    with pytest.raises(LimeError) as refused:
        list_inputs(given)
    assert says in str(refused.value) and "\n" not in str(refused.value) and not pauses


def test_an_unreachable_hub_is_one_line(
    pauses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(LimeError) as refused:
        list_inputs(f"hub:{NAME}")
    assert "refused, 7 times; try again when the network is better" in str(refused.value) and "\n" not in str(
        refused.value
    )
    assert sum(pauses) == 63 and capfd.readouterr() == ("", "")
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path, offline=True)
    with pytest.raises(LimeError, match="HF_HUB_OFFLINE is set"):
        list_inputs(f"hub:{NAME}")


def test_shards_equal_those_of_a_local_copy_through_faults(
    hub: Hub, data: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    local = run(data / "data", tokenizer_folder, tmp_path / "local", "--drop-duplicates")
    hub.faults += [Fault(kind, "/content/.*") for kind in ("page", "flip", "short", "reset")]
    hub.uses = 5
    remote = run(f"hub:{NAME}", tokenizer_folder, tmp_path / "remote", "--drop-duplicates")
    assert shards(tmp_path / "remote") == shards(tmp_path / "local") and not any(fault.times for fault in hub.faults)
    asked = hub.count("^/api/datasets/")
    HfFileSystem.clear_instance_cache()
    list_inputs(f"hub:{NAME}")
    assert hub.count("^/api/datasets/") == 2 * asked, "by the parent alone: as much as one listing"
    assert remote["counts"] == local["counts"] and remote["hub"] == {"input": f"hub:{NAME}", "commit": hub.main}


def test_damage_that_stays_is_an_error_and_nothing_of_it_is_kept(
    hub: Hub, data: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    local = run(data / "data", tokenizer_folder, tmp_path / "local")
    broken = bytearray((data / "data/CC-2/b.parquet").read_bytes())
    place = broken.index(b"text 120 of")
    broken[place : place + 4] = b"XXXX"
    hub.served["data/CC-2/b.parquet"] = bytes(broken)
    with pytest.raises(LimeError, match=r"b.parquet: has arrived damaged .*, twice; nothing of it is kept"):
        run(f"hub:{NAME}", tokenizer_folder, tmp_path / "remote")
    assert not (tmp_path / "remote" / "dataset.json").exists()
    hub.served.clear()
    assert run(f"hub:{NAME}", tokenizer_folder, tmp_path / "remote")["counts"] == local["counts"]
    assert shards(tmp_path / "remote") == shards(tmp_path / "local")


def test_a_restart_goes_on_with_the_commit_that_it_began_with(
    hub: Hub, data: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output, publish, begun = tmp_path / "out", Manifest.publish, hub.main
    run(data / "data", tokenizer_folder, tmp_path / "local")

    def interrupted(self: Manifest, result: dict[str, Any], scratch: Path) -> None:
        publish(self, result, scratch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(f"hub:{NAME}", tokenizer_folder, output)
    pq.write_table(pa.table({"text": ["new"], "score": [1.0]}), data / "data/CC-1/a.parquet")
    hub.commit(data)
    capsys.readouterr()
    assert run(f"hub:{NAME}", tokenizer_folder, output)["hub"]["commit"] == begun
    assert f"hub: {NAME} at commit {begun}" in capsys.readouterr().out
    assert shards(output) == shards(tmp_path / "local")
    kept = hub.commits.pop(begun)
    with pytest.raises(LimeError, match=f"begun with commit {begun}, which the hub no longer has .*add --fresh"):
        run(f"hub:{NAME}", tokenizer_folder, output)
    hub.commits[begun] = kept
    (data / "data/CC-1/a.parquet").write_bytes(kept["data/CC-1/a.parquet"])
    (data / "README.md").write_text(README + "more words\n")
    newest = hub.commit(data)
    assert newest != begun
    run(f"hub:{NAME}@{newest}", tokenizer_folder, output)
    assert "dataset complete, reused" in capsys.readouterr().out, "only the README has changed"
