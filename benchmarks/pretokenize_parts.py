"""Measure what each part of pretokenizing costs on one core, in MB of text per CPU second.

    python benchmarks/pretokenize_parts.py --input runs/pretokenize/input --tokenizer runs/pretokenize/bpe --output runs/pretokenize-parts

Every part runs alone over the same documents, in memory, as a worker does it. ``all of it`` is what a worker does with them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from results import write

from data_tools.pretokenize.encoding import EncodeUnit, Layout, split_of
from data_tools.pretokenize.pool import Progress
from data_tools.pretokenize.units import Selection, plan_units, unit_documents
from data_tools.sources.inputs import list_inputs
from data_tools.sources.tally import Tally
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.encoder_choice import choose_encoder
from lime_dist.data.indexed import IndexedWriter
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

LAYOUT = Layout(validation=0.01, test=0.0, shard_tokens=1 << 26, shuffle=None, bos=False, eos=True)


def cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median CPU time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=user_path, required=True, help="parquet files")
    parser.add_argument("--tokenizer", type=user_path, required=True, help="folder made by data_tools.tokenizer")
    parser.add_argument("--output", type=user_path, required=True, help="folder for shards and the table")
    parser.add_argument("--units", type=int, default=8, help="units of the input to take (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each part (default 3)")
    arguments = parser.parse_args()
    if min(arguments.units, arguments.repeats) < 1:
        raise LimeError("--units and --repeats must be at least 1")
    units = plan_units(list_inputs(str(arguments.input)), "text", LAYOUT.shard_tokens)[: arguments.units]
    texts = [text for unit in units for text in unit_documents(unit, Selection("text"), Tally())]
    raw = [text.encode() for text in texts]
    size = sum(map(len, raw)) / 1e6
    slow = Tokenizer(arguments.tokenizer)
    fast = choose_encoder("auto", slow, texts[:64])
    ids = [one.astype("<u2") for one in fast.encode_batch(texts)]
    scratch = arguments.output / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    task = EncodeUnit(arguments.tokenizer, fast.converted_model, scratch, Selection("text"), LAYOUT, None)
    task.prepare()
    warm = Progress([0] * (1 + 3 * (units[-1].index + 1)), 0)
    for unit in units:  # gigatoken remembers words, as it has done for the other parts
        task(unit, warm)

    def read() -> None:
        for unit in units:
            for _ in unit_documents(unit, Selection("text"), Tally()):
                pass

    def encode(tokenizer: Tokenizer) -> None:
        rest = iter(texts)
        while batch := list(islice(rest, 64)):
            tokenizer.encode_batch(batch)

    def index() -> None:
        with IndexedWriter(scratch / "index", np.dtype("<u2")) as writer:
            for one in ids:
                writer.add_document(one)

    def sync() -> None:
        with open(scratch / "synced", "wb") as file:
            file.write(b"".join(one.tobytes() for one in ids))
            file.flush()
            os.fsync(file.fileno())

    parts: list[tuple[str, Callable[[], Any]]] = [
        ("parquet to text, with page checksums", read),
        ("UTF-8 and the hash that decides the split", lambda: [split_of(text.encode(), 0.01) for text in texts]),
        (f"encoding, {fast.encoder_name}", lambda: encode(fast)),
        ("encoding, sentencepiece", lambda: encode(slow)),
        ("SHA-256 of the shard", lambda: [hashlib.sha256(one.data) for one in ids]),
        ("shard with index and SHA-256, written and synced", index),
        ("the same bytes, only written and synced", sync),
        ("all of it", lambda: [task(unit, warm) for unit in units]),
    ]
    lines = ["| part | MB of text per CPU second | share of all of it |", "|---|---|---|"]
    seconds = {name: cpu_seconds(work, arguments.repeats) for name, work in parts}
    for name, value in seconds.items():
        share = "" if name == "encoding, sentencepiece" else f"{value / seconds['all of it']:.0%}"
        lines.append(f"| {name} | {size / value:,.1f} | {share} |")
    shutil.rmtree(scratch)
    table = "\n".join(lines) + "\n"
    write(arguments.output / "table.md", table)
    print(table)


if __name__ == "__main__":
    run_command(main)
