"""Text to token shards: cut the input into units, encode them in worker processes, describe the result in dataset.json.

Workers write into a scratch folder; the parent alone moves a unit's finished shards to their names and then notes them
in ``units.ndjson``. A killed run continues from the noted shards whose hashes still hold. dataset.json comes last, so a
folder that has it is whole. The bytes depend on the input's names and content, the tokenizer and the settings alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import TOOL_VERSION
from data_tools.common import command_parser, disk_errors, progress_bar, start_worker
from data_tools.manifest import Manifest, Result, finish, whole
from data_tools.sources import Tally, documents, fingerprint, list_inputs
from data_tools.tokenizer import Tokenizer, first_failure
from data_tools.units import COUNTERS, Job, Unit, encode_unit, plan_units
from lime_dist.data.files import lock_folder
from lime_dist.errors import LimeError, run_command

TOKENIZER_FOLDER, SCRATCH = "tokenizer", ".scratch"
CHECKED_DOCUMENTS = 64


def check_round_trip(given: str, text_column: str, tokenizer: Tokenizer) -> None:
    """Before anything is written: there is text, and the tokenizer gives its beginning back exactly (LimeError)."""
    tally = Tally()
    texts = [text for *_, text in islice(documents(given, text_column, tally), CHECKED_DOCUMENTS)]
    if not texts:
        why = f"the first thing wrong: {tally.rejected[0]}" if tally.rejected else "every row is empty or null"
        raise LimeError(f"--input {given}: no text found; {why}; give other files or another --text-column")
    failure = first_failure(tokenizer, texts)
    if failure is not None:
        raise LimeError(
            f"{tokenizer.folder}: decoding does not give this text of the input back: {failure[:80]!r}; train one "
            "with data_tools.tokenizer"
        )


_worker: dict[str, Any] = {}  # what the initialiser leaves for the units that this worker process gets


def _start(parent: int, job: Job, counters: Any) -> None:
    start_worker(parent)
    _worker.update(job=job, counters=counters, tokenizer=Tokenizer(job.tokenizer))


def _encode(unit: Unit) -> Result:
    return encode_unit(unit, _worker["job"], _worker["tokenizer"], _worker["counters"])


def encode_units(
    units: list[Unit], todo: list[Unit], job: Job, workers: int, publish: Callable[[Result], None]
) -> tuple[int, float]:
    """Encode the units ``todo`` of all ``units`` in worker processes; ``publish`` gets each result as it comes.

    Returns the bytes of text encoded and the seconds taken. LimeError if a worker dies: what has been published stays.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of pyarrow and sentencepiece
    counters = context.RawArray("q", 1 + COUNTERS * len(units))
    counts = np.frombuffer(counters, dtype=np.int64)[1:].reshape(-1, COUNTERS)
    sizes = np.asarray([unit.text_bytes for unit in units])
    waiting, running, start = iter(todo), dict[Future[Result], Unit](), time.perf_counter()
    done_bytes = int(sizes.sum()) - sum(unit.text_bytes for unit in todo)
    workers = min(workers, len(todo))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(os.getpid(), job, counters))
    bar = progress_bar(int(sizes.sum()), "pretokenize", initial=done_bytes)
    try:
        while True:
            for unit in islice(waiting, 2 * workers - len(running)):
                running[pool.submit(_encode, unit)] = unit
            if not running:
                break
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                publish(future.result())
                done_bytes += running.pop(future).text_bytes
            under_way = [unit.index for unit in running.values()]
            text_bytes, tokens, _ = counts.sum(axis=0).tolist()
            speed = text_bytes / 1e6 / (time.perf_counter() - start)
            bar.set_postfix_str(f"{tokens / 1e6:.2f} M tokens, {speed:.1f} MB/s", refresh=False)
            bar.update(done_bytes + int(np.minimum(counts[under_way, 0], sizes[under_way]).sum()) - bar.n)
    except BrokenProcessPool:
        names = ", ".join(str(unit) for unit in islice(running.values(), workers))
        raise LimeError(
            f"a worker process died (killed, or out of memory) while these were under way: {names}; what is finished "
            "is kept, run the same command again, with fewer --workers if memory is short"
        ) from None
    finally:
        counters[0] = 1
        pool.shutdown(cancel_futures=True)
        bar.close()
    return int(counts[:, 0].sum()), time.perf_counter() - start


def pretokenize(options: argparse.Namespace) -> None:
    """The whole command: reuse, resume or start, and finish."""
    files, tokenizer, output = list_inputs(options.input), Tokenizer(options.tokenizer), Path(options.output)
    header = {
        "settings": {
            "tokenizer_hash": tokenizer.hash,
            "text_column": options.text_column,
            "validation_fraction": options.validation_fraction,
            "bos": options.bos,
            "shard_tokens": options.shard_tokens,
            "tool_version": TOOL_VERSION,
        },
        "inputs": [fingerprint(file) for file in files],
    }
    with lock_folder(output):
        for scratch in output.glob(f"{SCRATCH}-*"):
            shutil.rmtree(scratch)
        manifest = Manifest(output, header, fresh=options.fresh)
        if whole(output):
            print(f"dataset complete, reused: {output}")
            return
        check_round_trip(options.input, options.text_column, tokenizer)
        tokenizer.copy_to(output / TOKENIZER_FOLDER)
        units = plan_units(files, options.text_column, options.shard_tokens)
        results = manifest.load(len(units))
        if results:
            print(f"{len(results)} of {len(units)} units are finished and whole; going on with the rest")
        # A name of this run's own: whatever an orphan of a killed run still writes, it cannot land among our shards.
        scratch = output / f"{SCRATCH}-{os.getpid()}-{time.time_ns()}"
        scratch.mkdir()
        stop = options.on_error == "stop"
        job = Job(
            str(output / TOKENIZER_FOLDER),
            str(scratch),
            options.text_column,
            options.validation_fraction,
            options.bos,
            options.shard_tokens,
            stop,
        )

        def publish(result: Result) -> None:
            manifest.publish(result, scratch)
            results[result["unit"]] = result

        todo = [unit for unit in units if unit.index not in results]
        try:
            if todo:
                text_bytes, seconds = encode_units(units, todo, job, options.workers, publish)
                print(f"encoded {text_bytes / 1e6:.1f} MB in {seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        finish(manifest, [results[unit.index] for unit in units], tokenizer, options.input, stop, options.max_rejected)


def main(arguments: list[str] | None = None) -> None:
    """``python -m data_tools.pretokenize``."""
    parser = command_parser(
        "pretokenize",
        "Encode parquet or JSONL text into Megatron .bin/.idx shards with a train/validation split by document.\n"
        "Killed at any moment, the same command finishes the rest. Rows count from 1.",
        "python -m data_tools.pretokenize --input data/embedded --tokenizer data/tokenizer --output data/shards",
    )
    parser.add_argument("--input", required=True, help="folder, glob or file of parquet or JSONL (.gz)")
    parser.add_argument("--tokenizer", required=True, help="folder made by data_tools.tokenizer")
    parser.add_argument("--output", required=True, help="folder for the shards and dataset.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--text-column", default="text", help="default: text")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of documents held out (default 0.01)"
    )
    parser.add_argument("--shard-tokens", type=int, default=1 << 26, help="most tokens in a shard (default 67108864)")
    parser.add_argument("--bos", action="store_true", help="begin documents with bos; they always end with eos")
    parser.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="bad rows: count and name (default), or stop"
    )
    parser.add_argument(
        "--max-rejected", type=float, default=0.01, help="fail if a larger share of rows or files is bad (default 0.01)"
    )
    parser.add_argument("--fresh", action="store_true", help="drop what the folder holds and start again")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.shard_tokens < 1:
        raise LimeError("--workers and --shard-tokens must be at least 1")
    if not 0 <= options.validation_fraction < 1 or not 0 <= options.max_rejected <= 1:
        raise LimeError("--validation-fraction must be in [0, 1) and --max-rejected in [0, 1]")
    with disk_errors("what is finished is kept, put this right and run the same command again"):
        pretokenize(options)


if __name__ == "__main__":
    run_command(main)
