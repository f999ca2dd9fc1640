"""Tests that a checkpoint identifies the data that it has read, and that going on with others says what it means."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.folders import records, values
from support.workers import WorkerGroup

from lime_dist.checkpoint.data_changes import DataComparison, compare_data
from lime_dist.checkpoint.manifest import make_manifest, manifest_checksum
from lime_dist.config.load import load_config, make_config
from lime_dist.config.schema import Config
from lime_dist.data.blend import Blend, open_training
from lime_dist.data.identity import PROBE_TOKENS, PROBES, DataIdentity, hash_tokens
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.state import TrainState

LENGTH, CONSUMED = 4, 700
Workers = Callable[[int], WorkerGroup]


def write_pair(prefix: Path, tokens: np.ndarray, dtype: str = "<u2") -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, dtype) as writer:
        for document in np.array_split(tokens, 20):
            writer.add_document(document)
    return str(prefix)


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, str]:
    """Prefixes of three corpora, a and b of equal size."""
    tokens = np.random.default_rng(0).integers(0, 50, (3, 4000)).astype(np.uint16)
    tokens[2, 3000:] = 0
    return {name: write_pair(tmp_path / name, row) for name, row in zip("abc", tokens, strict=True)}


def configured(*sources: tuple[str, float] | str, **data: Any) -> Config:
    """A configuration whose ``data`` are one path, or a blend of (path, weight)."""
    listed = [{"path": one[0], "weight": one[1]} for one in sources if not isinstance(one, str)]
    source = {"blend": listed} if listed else {"path": sources[0]}
    return make_config({"data": {**source, "sequence_length": LENGTH, "validation_fraction": 0.1, **data}}, "a test")


def identity(config: Config) -> DataIdentity:
    return DataIdentity.of(open_training(config.data, 100)[0], LENGTH)


def compare(before: Config, now: Config, change: Callable[[dict[str, Any]], object] | None = None) -> DataComparison:
    """Compare the data of a run with those of a checkpoint of step 7; ``change`` edits its manifest."""
    layout = {"pipeline_stages": 1, "replicas": 1, "zero_stage": 0}
    state = TrainState(7, CONSUMED)
    manifest = make_manifest(
        before, state, optimizer_steps=7, data=identity(before), layout=layout, files=[]
    )  # fmt: skip
    manifest = json.loads(json.dumps(manifest))
    if change:
        change(manifest)
    return compare_data(Path("run/global_step7"), manifest, now, identity(now))


def test_the_same_data_may_lie_elsewhere(pairs: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(tmp_path, tmp_path / "moved", ignore=lambda *_: ["moved"])
    wide = write_pair(tmp_path / "wide", np.fromfile(f"{pairs['a']}.bin", "<u2"), "<i4")
    for before, now in [
        (configured(pairs["a"]), configured(str(tmp_path / "moved" / "a"))),
        (configured(pairs["a"]), configured(wide)),
        (
            configured((pairs["a"], 3), (pairs["b"], 1)),
            configured((str(tmp_path / "moved" / "a"), 0.75), (pairs["b"], 0.25)),
        ),
    ]:
        assert compare(before, now) == DataComparison()


def test_another_order_is_refused_with_the_line_to_write(pairs: dict[str, str]) -> None:
    """Entries in another order, other weights, a blend of one instead of a path: the suggested overrides restore the order."""
    ab = configured((pairs["a"], 1), (pairs["b"], 1))
    for before, now in [
        (ab, configured((pairs["b"], 1), (pairs["a"], 1))),
        (ab, configured((pairs["a"], 1), (pairs["b"], 2))),
        (configured(pairs["a"]), configured((pairs["a"], 1))),
        (configured((pairs["a"], 1)), configured(pairs["a"])),
    ]:
        problem = compare(before, now).problem
        assert problem is not None and "\n" not in problem and "run/global_step7 is of another run" in problem
        line = re.search(r"write (.*) to go on as it began, or data.accept_change=true", problem)
        assert line is not None
        keep = [f"data.{key}={getattr(now.data, key)}" for key in ("sequence_length", "validation_fraction")]
        assert compare(before, load_config(None, [*keep, *shlex.split(line[1])])) == DataComparison()


@pytest.mark.parametrize("what", ["another corpus", "one token", "fraction", "one more", "one less"])
def test_changed_data_is_refused_and_named(pairs: dict[str, str], tmp_path: Path, what: str) -> None:
    before = now = configured((pairs["a"], 1), (pairs["b"], 1))
    if what == "another corpus":
        now = configured((pairs["a"], 1), (pairs["c"], 1))
    elif what == "one token":
        tokens = np.fromfile(f"{pairs['b']}.bin", "<u2")
        tokens[1234] += 1
        now = configured((pairs["a"], 1), (write_pair(tmp_path / "new" / "b", tokens), 1))
    elif what == "fraction":
        now = configured((pairs["a"], 1), (pairs["b"], 1), validation_fraction=0.2)
    elif what == "one more":
        now = configured((pairs["a"], 1), (pairs["b"], 1), (pairs["c"], 1))
    else:
        now = configured((pairs["a"], 1))
    problem = compare(before, now).problem
    assert (
        problem is not None
        and "give the data that it has read, or another run.directory, or data.accept_change" in problem
    )
    if what in ("another corpus", "one token"):
        assert "dataset 2: 3,600 tokens with hash" in problem and pairs["b"] in problem and "dataset 1" not in problem
    if what in ("one more", "one less"):
        assert f"datasets: 2 there, {3 if what == 'one more' else 1} here" in problem


def test_a_checkpoint_of_an_earlier_version_loads_with_a_line(pairs: dict[str, str]) -> None:
    config = configured(pairs["a"])
    (note,) = compare(config, config, lambda manifest: manifest.pop("data")).notes
    assert note.startswith("run/global_step7 does not say which data it has read")
    refused = compare(config, configured(pairs["a"], validation_fraction=0.5), lambda manifest: manifest.pop("data"))
    assert refused.problem is not None and "training samples: 899 there, 499 here" in refused.problem


def read_samples(config: Config) -> list[list[bytes]]:
    """Of each dataset, the samples that the first CONSUMED positions read, in order."""
    training, order = open_training(config.data, 100)
    splits = training.splits if isinstance(training, Blend) else [training]
    starts = np.cumsum([0, *(split.num_samples(LENGTH) for split in splits)])
    samples = order.samples_at(np.arange(CONSUMED))
    return [
        [training.sample(int(i), LENGTH).tobytes() for i in samples if starts[k] <= i < starts[k + 1]]
        for k in range(len(splits))
    ]


def test_an_accepted_change_says_what_is_read_again_and_left_out(pairs: dict[str, str]) -> None:
    """The numbers are those of the orders: exact where a dataset keeps its order, expected ones where it gets another."""
    a, b, c = (pairs[name] for name in "abc")
    before = configured((a, 1), (b, 1))
    heavier = configured((a, 3), (b, 1), accept_change=True)
    notes = compare(before, heavier).notes
    assert notes[0].startswith(
        "data.accept_change=true: run/global_step7 has read other data up to step 7 (data.blend: [1.0, 1.0]"
    )
    read = [[len(one) for one in read_samples(config)] for config in (before, heavier)]
    assert notes[1:] == (
        f"{a}: {read[1][0] - read[0][0]:,} samples are left out",
        f"{b}: {read[0][1] - read[1][1]:,} samples are read again",
    )
    swapped = configured((b, 1), (a, 1), accept_change=True)
    for note, old, new in zip(
        compare(before, swapped).notes[1:], read_samples(before)[::-1], read_samples(swapped), strict=True
    ):
        samples, again, out = (int(number) for number in re.findall(r"(\d+)(?: samples|(?= are))", note))
        assert samples == 899 and abs(out - len(set(new) - set(old))) < 40
        assert abs(again - len(set(old) - set(new))) < 40, "what is still to come of the epoch, and was read before"
    other = compare(before, configured((a, 1), (c, 1), accept_change=True)).notes[1:]
    assert other[0] == f"{a}: goes on where it was" and other[2] == f"{b}: is no longer read"
    assert re.fullmatch(rf"{c}: is new; \d+ of its 899 samples are left out in its current epoch", other[1])


def test_tokens_are_hashed_whatever_their_type_and_evenly_if_there_are_many() -> None:
    small = np.arange(1000)
    assert hash_tokens([small.astype("<u2")]) == hash_tokens([small.astype("<i4")]) != hash_tokens([small + 1])
    large = np.zeros(2 * PROBES * PROBE_TOKENS, np.uint16)
    hashes = {hash_tokens([large])}
    for place in (0, large.size // 2 // PROBE_TOKENS * PROBE_TOKENS + PROBE_TOKENS // 2, large.size - 1):
        changed = large.copy()
        changed[place : place + PROBE_TOKENS] = 1
        hashes.add(hash_tokens([changed]))
    assert len(hashes) == 4


def test_a_run_refuses_or_accepts_reordered_data(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """A run over a blend whose entries are swapped, of equal weight and size: other samples would follow."""
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    facts = json.loads((other / "dataset.json").read_text())
    shard = facts["splits"]["train"]["shards"][0]
    tokens = np.fromfile(other / f"{shard['name']}.bin", "<u2")[::-1]
    with IndexedWriter(other / shard["name"], "<u2") as writer:
        writer.add_document(tokens)
    shard |= {key: getattr(writer, key) for key in ("bin_bytes", "idx_bytes", "bin_sha256", "idx_sha256")}
    (other / "dataset.json").write_text(json.dumps(facts))

    def run(*paths: Path, steps: int = 4, **data: Any) -> tuple[str, str]:
        settings = values(dataset, tmp_path / "run", steps)
        settings["data"] = {
            "sequence_length": 16, "blend": [{"path": str(path), "weight": 1} for path in paths], **data
        }  # fmt: skip
        settings["train"] |= {"checkpoint_interval": 2, "evaluation_interval": 100}
        return tuple(workers(1).run("support.runs.observe", values=settings)[0])

    assert run(dataset, other)[0] == ""
    manifest = json.loads((tmp_path / "run/checkpoints/global_step4/manifest.json").read_text())
    assert [one["path"] for one in manifest["data"]] == [str(dataset), str(other)]
    assert manifest["data"][0]["tokens"] == manifest["data"][1]["tokens"]
    error, _ = run(other, dataset, steps=6)
    assert "write 'data.blend=" in error and error.index(str(dataset), error.index("write '")) < error.rindex(
        str(other)
    )
    assert len(records(tmp_path / "run")) == 5, "4 steps and a validation: nothing was trained"
    moved = tmp_path / "moved"
    shutil.move(other, moved)
    error, said = run(dataset, moved, steps=6)
    assert error == "" and "accept_change" not in said
    error, said = run(moved, dataset, steps=8, accept_change=True)
    assert error == "" and f"{moved}: has another order; of its" in said
    file = tmp_path / "run/checkpoints/global_step8/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["data"]
    file.write_text(json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
    error, said = run(moved, dataset, steps=10)
    assert error == "" and "global_step8 does not say which data it has read" in said
