"""Tests of checkpoints on disk: a damaged one is passed over with a line, ``latest`` decides, and old ones are deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import settings
from support.workers import WorkerGroup

from lime_dist.checkpoint.manifest import manifest_checksum, read_manifest
from lime_dist.checkpoint.reading import find_checkpoint

Workers = Callable[[int], WorkerGroup]
FILES = ["manifest.json", "stage000-replica000.pt", "stage001-replica000.pt"]


@pytest.fixture(scope="module")
def saved(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    assert (
        workers(2).run("support.checkpoints.save", values=settings(), directory=str(directory), steps=[1, 2])
        == [["", ""]] * 2
    )
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def find(workers: Workers, directory: Path) -> tuple[int | None, list[str]]:
    first, second = workers(2).run("support.checkpoints.find", directory=str(directory))
    assert first == second, "all ranks come to the same"
    return first


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and correct its checksum."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if "checksum" in manifest:
        manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_files_of_a_saved_checkpoint(saved: Path, workers: Workers) -> None:
    assert names(saved) == ["global_step1", "global_step2", "latest"]
    assert (saved / "latest").read_text() == "global_step2\n"
    assert names(saved / "global_step2") == FILES
    manifest = json.loads((saved / "global_step2/manifest.json").read_text())
    assert manifest["state"] == {"step": 2, "consumed_samples": 8} and manifest["version"]
    assert manifest["layout"] == {"pipeline_stages": 2, "replicas": 1, "zero_stage": 0}
    assert manifest["config"]["model"]["hidden_size"] == 8
    assert find(workers, saved) == (2, [])
    assert workers(2).run("support.checkpoints.load", values=settings(), directory=str(saved)) == [2, 2]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "removed", "a folder"])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_passed_over(workers: Workers, copy: Path, file: str, damage: str) -> None:
    path = copy / "global_step2" / file
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-2])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    step, lines = find(workers, copy)
    assert step == 1 and len(lines) == 1
    assert lines[0].startswith(f"{copy}/global_step2: {file} ") and lines[0].endswith("; passed over")


def test_every_flipped_bit_of_a_manifest_is_noticed(copy: Path) -> None:
    """Either the manifest is damaged, or, for a bit of white space, its values have not changed."""
    path = copy / "global_step2/manifest.json"
    content = path.read_bytes()
    _, whole = read_manifest(path.parent, 2)
    refused = 0
    for bit in range(0, 8 * len(content), 13):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        problem, manifest = read_manifest(path.parent, 2)
        assert problem is not None or manifest == whole
        refused += problem is not None
    assert refused > len(content) // 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["files"][0].update(file="../../elsewhere.pt"), "files.0.file"),
        (lambda m: m["files"][0].update(file="/etc/passwd"), "files.0.file"),
        (lambda m: m["files"][0].update(bytes="12"), "files.0.bytes"),
        (lambda m: m["files"][0].update(parameters={"x": [-1]}), "files.0.parameters"),
        (lambda m: m["files"][0].update(parameters=["x"]), "files.0.parameters"),
        (lambda m: m["state"].update(step=2.5), "state.step"),
        (lambda m: m["state"].update(consumed_samples=-8), "state.consumed_samples"),
        (lambda m: m["state"].update(step=7), "is of step 7"),
        (lambda m: m.pop("state"), "state: field required"),
        (lambda m: m.pop("checksum"), "checksum: field required"),
        (lambda m: m.update(config=[]), "config"),
        (lambda m: m.update(files=[]), "files"),
        (lambda m: m.update(format="another 1"), "format"),
        (lambda m: m["files"].append(m["files"][0]), "twice"),
        (lambda m: m["files"][0]["parameters"].popitem(), "stage000-replica000.pt holds other tensors"),
        (lambda m: m["files"][1].update(dtype="float64"), "stage001-replica000.pt holds other tensors"),
        (lambda m: m["files"][1]["parameters"].update({"model.norm.weight": [4]}), "holds other tensors"),
    ],
)  # fmt: skip
def test_an_invalid_manifest_is_passed_over(
    workers: Workers, copy: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    rewrite(copy / "global_step2", change)
    step, lines = find(workers, copy)
    assert step == 1 and len(lines) == 1 and said in lines[0], lines


@pytest.mark.parametrize("text", ["[]", "3", '{"files": [', "[" * 100_000, "null", '{"a": "\\ud800"}'])
def test_a_file_that_is_no_manifest_is_passed_over(workers: Workers, copy: Path, text: str) -> None:
    (copy / "global_step2/manifest.json").write_text(text)
    step, (line,) = find(workers, copy)
    assert step == 1 and "manifest.json is damaged" in line


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("content", ["objects", "text", "a list"])
def test_a_file_that_holds_something_else_is_never_unpickled(
    workers: Workers, copy: Path, tmp_path: Path, content: str
) -> None:
    """Its hash is that of the manifest, so the difference shows only when it is read."""
    import hashlib

    file = copy / "global_step2/stage001-replica000.pt"
    if content == "text":
        file.write_text("no tensors\n")
    else:
        torch.save(Bomb(tmp_path / "harm") if content == "objects" else [torch.ones(1)], file)
    fits = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    rewrite(copy / "global_step2", lambda manifest: manifest["files"][1].update(fits))
    step, (line,) = find(workers, copy)
    assert step == 1 and "stage001-replica000.pt holds no tensors" in line
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("text", "step", "said"),
    [
        ("global_step1\n", 1, ["latest names global_step1; the newer global_step2 is left aside"]),
        ("global_step9", 2, ["latest names global_step9, which does not exist; looking for"]),
        ("../elsewhere", 2, ["latest names no checkpoint ('../elsewhere'); looking for"]),
        ("", 2, ["latest names no checkpoint (''); looking for"]),
        (b"\xff\xfe\x00", 2, ["latest cannot be read"]),
        (None, 2, ["latest is missing; looking for"]),
    ],
)
def test_latest_decides_if_it_can(
    workers: Workers, copy: Path, text: str | bytes | None, step: int, said: list[str]
) -> None:
    (copy / "latest").unlink()
    if text is not None:
        (copy / "latest").write_bytes(text if isinstance(text, bytes) else text.encode())
    chosen, lines = find(workers, copy)
    assert chosen == step and len(lines) == len(said)
    assert all(f"{copy}/{part}" in line for part, line in zip(said, lines, strict=True)), lines


def test_without_a_whole_checkpoint_none_is_returned(workers: Workers, copy: Path, tmp_path: Path) -> None:
    assert find(workers, tmp_path / "none") == (None, [])
    for step in (1, 2):
        (copy / f"global_step{step}/stage000-replica000.pt").unlink()
    step, lines = find(workers, copy)
    assert step is None and len(lines) == 2


def test_old_checkpoints_are_deleted(workers: Workers, tmp_path: Path) -> None:
    """With keep_last=2 and keep_every=4. What a killed process left is removed; other files and folders stay."""
    directory = tmp_path / "checkpoints"
    (directory / ".global_step3.partial").mkdir(parents=True)
    (directory / ".global_step1.deleted").mkdir()
    (directory / ".latest.123.tmp").touch()
    (directory / "global_step_of_mine").mkdir()
    (directory / "global_step50").mkdir()
    values = settings()
    values["train"] |= {"keep_last": 2, "keep_every": 4}
    group = workers(2)
    lines = group.run("support.checkpoints.save", values=values, directory=str(directory), steps=list(range(1, 11)))
    assert lines == [[""] * 10] * 2
    kept = ["global_step10", "global_step4", "global_step50", "global_step8", "global_step9", "global_step_of_mine"]
    assert names(directory) == [*kept, "latest"]
    values["train"] |= {"keep_last": None}
    group.run("support.checkpoints.save", values=values, directory=str(directory), steps=[11, 12, 13])
    assert set(names(directory)) == {*kept, "global_step11", "global_step12", "global_step13", "latest"}


@pytest.mark.parametrize("place", ["another disk", "nowhere"])
def test_links_are_removed_and_what_they_point_at_stays(workers: Workers, copy: Path, place: str) -> None:
    """Checkpoints that were moved to another disk and linked back, and links to something that is gone."""
    moved = copy.parent / "other disk"
    moved.mkdir()
    for step in (1, 2):
        folder = copy / f"global_step{step}"
        shutil.move(folder, moved)
        folder.symlink_to(moved / folder.name if place == "another disk" else moved / "gone")
    (copy / ".global_step1.deleted").symlink_to(moved)
    values = settings()
    values["train"] |= {"keep_last": 1}
    lines = workers(2).run("support.checkpoints.save", values=values, directory=str(copy), steps=[2, 3])
    assert lines == [["", ""]] * 2
    left = ["global_step3", "latest"] if place == "another disk" else ["global_step1", "global_step3", "latest"]
    assert names(copy) == left
    assert names(moved / "global_step1") == names(moved / "global_step2") == FILES


@pytest.mark.parametrize("where", ["global_step1", ".global_step1.deleted", ".global_step3.partial", ".latest.123.tmp"])
def test_what_cannot_be_deleted_is_named_once_and_saving_goes_on(workers: Workers, copy: Path, where: str) -> None:
    """Also after the next start, where it is named once more."""
    victim = copy / where / "immutable"
    victim.parent.mkdir(exist_ok=True)
    victim.touch()
    values, group = settings(), workers(2)
    values["train"] |= {"keep_last": 1}
    for steps in ([3, 4, 5], [6, 7]):
        lines, others = group.run(
            "support.checkpoints.save_beside_immutable", values=values, directory=str(copy), steps=steps
        )
        assert others == [""] * len(steps)
        told = [line for line in lines if line]
        assert len(told) == 1 and told[0].startswith("warning: cannot delete ") and "immutable: Operation" in told[0]
        assert Path(told[0].removeprefix("warning: cannot delete ").partition(": ")[0]).is_file()
        assert find(workers, copy) == (steps[-1], [])
        assert [name for name in names(copy) if name.startswith("global_step")] == [f"global_step{steps[-1]}"]


def test_a_step_is_saved_again(workers: Workers, copy: Path) -> None:
    """It replaces a damaged checkpoint of the same step."""
    (copy / "global_step2/manifest.json").unlink()
    group = workers(2)
    assert group.run("support.checkpoints.save", values=settings(), directory=str(copy), steps=[2]) == [[""], [""]]
    assert group.run("support.checkpoints.load", values=settings(), directory=str(copy)) == [2, 2]
    assert names(copy) == ["global_step1", "global_step2", "latest"]


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 20, b"global_step2\0\0", b"global_step\xff", b"\xe2\x82", b"global_step" + b"9" * 5000]
)
def test_a_damaged_latest_is_passed_over_by_trainer_and_commands(
    workers: Workers, copy: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "latest").write_bytes(content)
    step, lines = find(workers, copy)
    assert step == 2 and len(lines) == 1 and lines[0].startswith(f"{copy}/latest ")
    assert find_checkpoint(copy) == copy / "global_step2"
    assert capsys.readouterr().err.startswith(f"warning: {copy}/latest ")
