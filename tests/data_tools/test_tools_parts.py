"""Protects parts: joined, they are byte for byte what one run writes; parts that do not belong together are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools import merge
from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.tokenizer.__main__ import main as tokenizer
from lime_dist.data.dataset import TokenSplit
from lime_dist.errors import LimeError

COUNT, OPTIONS = 3, ["--drop-duplicates", "--max-rejected", "0.2"]
SETTINGS = "--validation-fraction 0.1 --test-fraction 0.1 --shuffle 5 --workers 1".split()


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(given: Path, tokenizer_folder: Path, output: Path, *options: str, shard_tokens: int = 3000) -> None:
    fixed = ["--input", str(given), "--tokenizer", str(tokenizer_folder), "--output", str(output)]
    pretokenize([*fixed, *SETTINGS, "--shard-tokens", str(shard_tokens), *options])


@pytest.fixture(scope="module")
def given(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with a document that occurs twice, and a file of which all rows are bad: one part alone has too many."""
    folder = tmp_path_factory.mktemp("given") / "text"
    shutil.copytree(corpus, folder)
    shutil.copy(folder / "a.parquet", folder / "inner" / "same.parquet")
    (folder / "d.jsonl").write_text('{"other": 1}\n' * 3)
    return folder


@pytest.fixture(scope="module")
def parts(given: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("parts")
    for number in range(1, COUNT + 1):
        write(given, tokenizer_folder, root / str(number), "--part", f"{number}/{COUNT}", *OPTIONS)
    return [root / str(number) for number in range(1, COUNT + 1)]


def join(folders: list[Path], output: Path, *options: str) -> None:
    merge.main([*map(str, folders), "--output", str(output), *options])


def test_joined_parts_are_what_one_run_writes(
    given: Path, tokenizer_folder: Path, parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(given, tokenizer_folder, tmp_path / "whole", *OPTIONS)
    said = capsys.readouterr().out
    join(parts[::-1], tmp_path / "joined")
    assert content(tmp_path / "joined") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "joined/dataset.json").read_text())["counts"]["duplicates"] == 120
    assert capsys.readouterr().out.splitlines()[-3:-1] == said.splitlines()[-3:-1], "the same summary"
    sizes = [len(list(folder.glob("train-*.bin"))) for folder in parts]
    assert min(sizes) > 1 and max(sizes) - min(sizes) < sum(sizes) // 2, "every part has its share"
    join(parts, tmp_path / "joined")
    assert "dataset complete, reused" in capsys.readouterr().out
    next((tmp_path / "joined").glob("*.bin")).unlink()
    join(parts, tmp_path / "joined")
    assert content(tmp_path / "joined") == content(tmp_path / "whole")


def test_the_share_of_bad_rows_can_be_set_when_parts_are_joined(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(LimeError, match="--max-rejected"):
        join(parts, tmp_path / "joined", "--max-rejected", "0")
    join(parts, tmp_path / "joined", "--max-rejected", "0.3")
    assert (tmp_path / "joined/dataset.json").exists()


def test_a_part_is_resumed_and_reused(
    given: Path, tokenizer_folder: Path, parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, options = tmp_path / "part", ["--part", f"2/{COUNT}", *OPTIONS]
    shutil.copytree(parts[1], part)
    write(given, tokenizer_folder, part, *options)
    assert f"part 2/{COUNT} complete, reused" in capsys.readouterr().out
    next(part.glob("train-*.bin")).unlink()
    write(given, tokenizer_folder, part, *options)
    said = capsys.readouterr().out
    assert "no longer complete: " in said and "units.ndjson lists it" in said and "continuing with the rest" in said
    assert content(part) == content(parts[1])
    with pytest.raises(LimeError, match="no such file; .*parts are joined by data_tools.merge"):
        TokenSplit(part, "train")
    with pytest.raises(LimeError, match=rf"was made with part=2/{COUNT} \(now 1/{COUNT}\); give another --output"):
        write(given, tokenizer_folder, part, "--part", f"1/{COUNT}", *OPTIONS)
    with pytest.raises(LimeError, match=rf"was made with part=2/{COUNT} \(now None\)"):
        write(given, tokenizer_folder, part, *OPTIONS)


def test_more_parts_than_units(given: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Some parts are empty."""
    text = given / "inner/b.parquet"
    write(text, tokenizer_folder, tmp_path / "whole", shard_tokens=9_000_000)
    for number in (1, 2):
        write(text, tokenizer_folder, tmp_path / str(number), "--part", f"{number}/2", shard_tokens=9_000_000)
    assert not list((tmp_path / "2").glob("*.bin"))
    join([tmp_path / "1", tmp_path / "2"], tmp_path / "joined")
    assert content(tmp_path / "joined") == content(tmp_path / "whole")


def test_parts_that_do_not_belong_together_are_refused(
    given: Path, tokenizer_folder: Path, parts: list[Path], corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "joined"

    def refused(folders: list[Path], words: str) -> None:
        with pytest.raises(LimeError, match=words) as error:
            join(folders, output)
        assert "\n" not in str(error.value) and not output.exists()

    def changed(**values: Any) -> Path:
        """The last part with other facts."""
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(parts[-1], folder)
        facts = json.loads((folder / "part.json").read_text())
        settings = {**facts["settings"], **values.pop("settings", {})}
        (folder / "part.json").write_text(json.dumps({**facts, "settings": settings, **values}))
        return folder

    refused(parts[:2], rf"^part {COUNT}/{COUNT} missing; give the folders of all {COUNT} parts")
    refused(parts[1:2], rf"^parts 1/{COUNT}, 3/{COUNT} missing")
    refused([*parts, parts[1]], rf"2: is part 2/{COUNT}, as is .*give each part once")
    others = parts[:-1]
    refused([*others, changed(settings={"tokenizer_hash": "0"})], r"changed: was made with tokenizer_hash=0 \(in .*1: ")
    refused(
        [*others, changed(settings={"shuffle": None})], r"was made with shuffle=None \(in .*1: 5\); only parts of one"
    )
    refused([*others, changed(inputs=[])], "was made with other input files")
    line = json.loads((parts[-1] / "part.json").read_text())["plan"]
    other = changed(plan="0")
    units = other / "units.ndjson"
    units.write_text(units.read_text().replace(line, "0"))
    refused([*others, other], "changed: was made by another plan than")
    refused([*others, changed(part="3/4")], r"units.ndjson: does not list the units of the part; run its command again")
    other = changed()
    lines = [json.loads(line) for line in (other / "units.ndjson").read_text().splitlines()]
    own = [{**line, "encoder": "sentencepiece", "differs": "unit 1"} if "unit" in line else line for line in lines]
    (other / "units.ndjson").write_text("".join(f"{json.dumps(line)}\n" for line in own))
    second = tmp_path / "second"
    shutil.copytree(parts[1], second)
    lines = [json.loads(line) for line in (second / "units.ndjson").read_text().splitlines()]
    fast = [{**line, "encoder": "gigatoken"} if "unit" in line else line for line in lines]
    (second / "units.ndjson").write_text("".join(f"{json.dumps(line)}\n" for line in fast))
    refused(
        [second, parts[0], other],
        r"second: has ids of gigatoken, which differ in .*changed \(unit 1\); write this part again with --encoder sentencepiece",
    )
    (changed() / "part.json").unlink()
    refused([*others, tmp_path / "changed"], "part.json: no such file; the part is not finished: run its command again")
    next(changed().glob("*.idx")).write_bytes(b"")
    refused([*others, tmp_path / "changed"], "has 0 bytes, but units.ndjson says .*: truncated or changed")
    for part in ("0/3", "4/3", "3", "a/b", "-1/3"):
        with pytest.raises(LimeError, match=f"--part {part}: give NUMBER/COUNT with a number from 1"):
            write(given, tokenizer_folder, output, f"--part={part}")
    tokenizer(["train", "--input", str(corpus), "--output", str(tmp_path / "whole"), "--vocab-size", "400"])
    (tmp_path / "whole" / "dataset.json").write_text("{}")
    refused([*parts, tmp_path / "whole"], "whole: is no part of a dataset, but .*1 is one; join parts first, and alone")
