"""Join pretokenized folders of the same tokenizer, or the parts of one; files are hard-linked where the file system allows it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from data_tools import TOOL_VERSION
from data_tools.common import command_parser, disk_errors, progress_bar
from data_tools.pretokenize.encoding import SPLITS
from data_tools.pretokenize.manifest import Manifest, finish, is_complete
from data_tools.pretokenize.parts import check_encoders, check_parts, is_part, read_part, shards_of
from data_tools.tokenizer import Tokenizer
from lime_dist.data.dataset import DATASET_FILE, FORMAT, check_shard_sizes, read_dataset_json
from lime_dist.data.files import json_bytes, lock_folder, read_json, sync_folder, write_atomic
from lime_dist.data.indexed import is_pair, pair_paths
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import expand

SAME = ("tokenizer_hash", "vocab_size", "bos_id", "eos_id", "pad_id", "dtype")


def merged_description(folders: list[Path], descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the dataset.json of a merged folder: shards in the order of the folders, counts summed."""
    first = descriptions[0]
    splits: dict[str, Any] = {}
    for split in SPLITS:
        parts = [(i, one["splits"][split]) for i, one in enumerate(descriptions) if split in one["splits"]]
        if parts:
            shards = [{**shard, "name": _name(i, shard["name"])} for i, facts in parts for shard in facts["shards"]]
            sums = {key: sum(facts[key] for _, facts in parts) for key in ("tokens", "documents", "text_bytes")}
            splits[split] = {**sums, "shards": shards}
    return {
        "format": FORMAT,
        "tool_version": TOOL_VERSION,
        "source": ", ".join(str(one["source"]) for one in descriptions),
        "tokenizer": "tokenizer",
        **{key: first[key] for key in SAME},
        "merged": [
            {"folder": folder.name, "source": one["source"], "settings": one.get("settings"), "counts": one["counts"]}
            for folder, one in zip(folders, descriptions, strict=True)
        ],
        "counts": {key: sum(one["counts"].get(key, 0) for one in descriptions) for key in first["counts"]},
        "splits": splits,
    }


def _name(folder_index: int, shard: str) -> str:
    """``train-00003-00`` of the second folder becomes ``train-m01-00003-00``."""
    split, _, rest = shard.partition("-")
    return f"{split}-m{folder_index:02d}-{rest}"


def merge(given: list[str], output: Path, max_rejected: float | None = None) -> None:
    """Check all folders, then link or copy the shards, and write dataset.json last.

    Raises:
        LimeError: the folders have different tokenizers, a folder is incomplete, or ``output`` holds something else.
    """
    folders = [Path(folder) for folder in given]
    if output.resolve() in [folder.resolve() for folder in folders]:
        raise LimeError(f"--output {output}: is one of the folders to merge; give another one")
    for folder in folders:
        if is_pair(folder):
            raise LimeError(
                f"{folder}: is a Megatron .bin/.idx pair, which says neither its tokenizer nor its splits, so it cannot be "
                "merged; list it under data.blend of the run instead"
            )
    if parts := [folder for folder in folders if is_part(folder)]:
        if whole := [folder for folder in folders if folder not in parts]:
            raise LimeError(f"{whole[0]}: is no part of a dataset, but {parts[0]} is one; join parts first, and alone")
        merge_parts(folders, output, max_rejected)
        return
    descriptions = [read_dataset_json(folder) for folder in folders]
    for folder, one in zip(folders[1:], descriptions[1:], strict=True):
        for key in SAME:
            if one.get(key) != descriptions[0].get(key):
                raise LimeError(
                    f"{folder}: {key} is {one.get(key)}, but {descriptions[0].get(key)} in {folders[0]}; only "
                    "datasets of the same tokenizer can be merged: pretokenize one of them again"
                )
    description = merged_description(folders, descriptions)
    with lock_folder(output):
        if (output / DATASET_FILE).exists():
            if read_json(output / DATASET_FILE, "give another --output") == description:
                print(f"dataset complete, reused: {output}")
                return
            raise LimeError(f"{output}: holds another dataset; give another --output")
        shards = [
            (i, shard)
            for i, one in enumerate(descriptions)
            for facts in one["splits"].values()
            for shard in facts["shards"]
        ]
        with progress_bar(sum(shard["bin_bytes"] + shard["idx_bytes"] for _, shard in shards), "merge") as bar:
            for i, shard in shards:
                check_shard_sizes(folders[i], shard)
                sources = pair_paths(folders[i] / shard["name"])
                for source, target in zip(sources, pair_paths(output / _name(i, shard["name"])), strict=True):
                    _link(source, target)
                bar.update(shard["bin_bytes"] + shard["idx_bytes"])
        Tokenizer(folders[0] / descriptions[0]["tokenizer"]).copy_to(output / "tokenizer")
        sync_folder(output)
        write_atomic(output / DATASET_FILE, json_bytes(description))
    for split, facts in description["splits"].items():
        shares = ", ".join(
            f"{folder} {one['splits'].get(split, {'tokens': 0})['tokens'] / max(1, facts['tokens']):.1%}"
            for folder, one in zip(folders, descriptions, strict=True)
        )
        print(f"{split}: {facts['tokens']:,} tokens, {facts['documents']:,} documents: {shares}")
    print(f"dataset written: {output / DATASET_FILE}")


def merge_parts(folders: list[Path], output: Path, max_rejected: float | None) -> None:
    """Join all parts of a dataset into what one run would have written.

    Raises:
        LimeError: a part is missing, not finished, or of another dataset; or ``output`` holds something else.
    """
    facts, results = (list(values) for values in zip(*map(read_part, folders), strict=True))
    check_parts(folders, facts)
    check_encoders(folders, results)
    first = facts[0]
    with lock_folder(output):
        header = {key: first[key] for key in ("settings", "inputs", "hub") if key in first}
        manifest = Manifest(output, header, fresh=False)
        if is_complete(output):
            print(f"dataset complete, reused: {output}")
            return
        shards = [(folder, shard) for folder, own in zip(folders, results, strict=True) for shard in shards_of(own)]
        with progress_bar(sum(shard["bin_bytes"] + shard["idx_bytes"] for _, shard in shards), "merge") as bar:
            for folder, shard in shards:
                for source, target in zip(
                    pair_paths(folder / shard["name"]), pair_paths(output / shard["name"]), strict=True
                ):
                    _link(source, target)
                bar.update(shard["bin_bytes"] + shard["idx_bytes"])
        tokenizer = Tokenizer(folders[0] / "tokenizer")
        tokenizer.copy_to(output / "tokenizer")
        sync_folder(output)
        in_order = sorted((result for of_folder in results for result in of_folder), key=lambda result: result["unit"])
        finish(
            manifest,
            in_order,
            tokenizer,
            first["source"],
            stop=False,
            max_rejected=first["max_rejected"] if max_rejected is None else max_rejected,
        )


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a durable copy if the file systems differ."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.merge``."""
    parser = command_parser(
        "merge",
        "Join folders that data_tools.pretokenize wrote with the same tokenizer. Shards are hard-linked if possible, otherwise\n"
        "copied. To mix datasets by weight without joining them, list them under data.blend in the run's configuration. Folders\n"
        "that were written with --part become what one command would have written.",
        "python -m data_tools.merge data/fineweb data/cosmopedia --output data/both\n"
        "  python -m data_tools.merge data/part-* --output data/fineweb",
    )
    parser.add_argument(
        "folders", type=expand, metavar="DIR", nargs="+", help="finished folders, in the order in which to join them"
    )
    parser.add_argument("--output", type=expand, required=True, help="folder for the joined dataset")
    parser.add_argument(
        "--max-rejected",
        type=float,
        help="of parts: fail if a larger share of rows or files is bad (default: what they were written with)",
    )
    options = parser.parse_args(arguments)
    with disk_errors("fix this and run the same command again"):
        merge(options.folders, Path(options.output), options.max_rejected)


if __name__ == "__main__":
    run_command(main)
