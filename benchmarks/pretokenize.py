"""Measure speed and memory of `data_tools.pretokenize` beside bare sentencepiece over the same files.

    python benchmarks/pretokenize.py --output runs/pretokenize
    python benchmarks/pretokenize.py --output runs/pretokenize-memory --memory-gigabytes 5

The bare side reads the parquet files, encodes batches of 64 documents to numpy in as many threads as there are workers, and
writes the ids to one file: no hashes, no index, no fsync, no end-of-document token, no splits. Both sides are whole commands,
including start-up; they alternate, and the ratio is that of the medians. Memory is the sum of the resident pages of all processes of
a command, the largest of samples every 50 ms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from results import read_results, write, write_results

from data_tools.sources.documents import documents
from data_tools.sources.embedded import CONSTANTS
from data_tools.sources.inputs import list_inputs
from data_tools.sources.tally import Tally
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

ROOT = Path(__file__).resolve().parents[1]
MEDIAN_BYTES, SPREAD = 3600, 1.0  # of FineWeb-Edu's documents, roughly log-normal
ROW_GROUP = 1000

BARE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pyarrow.parquet as pq, sentencepiece

model_file, given, output, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
model = sentencepiece.SentencePieceProcessor(model_file=model_file)

def batches():
    for path in sorted(given.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(64, columns=["text"]):
            yield batch.column(0).to_pylist()

def encode(texts):
    return model.encode(texts, return_type="numpy", num_threads=1)

with ThreadPoolExecutor(threads) as pool, open(output, "wb") as file:
    waiting = []
    for texts in batches():
        waiting.append(pool.submit(encode, texts))
        if len(waiting) > 4 * threads:
            for ids in waiting.pop(0).result():
                file.write(ids.astype("<u2").data)
    for future in waiting:
        for ids in future.result():
            file.write(ids.astype("<u2").data)
"""


def make_input(folder: Path, megabytes: int) -> None:
    """Write parquet files with documents of FineWeb-Edu's lengths, from this machine's documentation."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    corpus = folder.with_name("corpus")
    command = [sys.executable, "-m", "data_tools.sources", "embedded", "--output", str(corpus), "--max-megabytes", "30"]
    subprocess.run(command, check=True, cwd=ROOT)
    paragraphs = [
        paragraph
        for *_, text in documents(list_inputs(str(corpus)), "text", Tally())
        for paragraph in text.split("\n\n")
        if paragraph.strip()
    ]
    generator = np.random.default_rng(0)

    def texts() -> Iterator[str]:
        """Yield documents: whole paragraphs in random order, up to a document's length."""
        left = megabytes * 1e6
        while left > 0:
            wanted, parts = generator.lognormal(np.log(MEDIAN_BYTES), SPREAD), list[str]()
            while wanted > 0:
                parts.append(paragraphs[int(generator.integers(len(paragraphs)))])
                wanted -= len(parts[-1]) + 2
            text = "\n\n".join(parts)
            left -= len(text.encode())
            yield text

    folder.mkdir(parents=True)
    all_texts = list(texts())
    for number, begin in enumerate(range(0, len(all_texts), 8 * ROW_GROUP)):
        rows = all_texts[begin : begin + 8 * ROW_GROUP]
        columns = {"text": rows, **{key: [value] * len(rows) for key, value in CONSTANTS.items()}}
        pq.write_table(pa.table(columns), folder / f"{number:05d}.parquet", row_group_size=ROW_GROUP)
    (folder / "done").touch()


def make_tokenizer(folder: Path, given: Path, model_type: str, vocab_size: int) -> None:
    """Train a tokenizer as users do."""
    command = [sys.executable, "-m", "data_tools.tokenizer", "train", "--input", str(given), "--output", str(folder)]
    command += ["--vocab-size", str(vocab_size), "--model-type", model_type, "--sample-megabytes", "16"]
    subprocess.run(command, check=True, cwd=ROOT)


def measure(command: list[str]) -> tuple[float, float]:
    """Return the seconds and peak megabytes of a command with its children."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(resident, family(process.pid))))
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise LimeError(
            f"{' '.join(command[:3])} failed: {(process.stderr.read() if process.stderr else b'').decode()}"
        )
    return seconds, peak / 1e6


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


def resident(pid: int) -> int:
    """Return the bytes in memory; shared pages count in proportion."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def ours(work: Path, given: Path, model_type: str, workers: int, *options: str) -> list[str]:
    """Return the command of data_tools.pretokenize, into an empty folder."""
    shutil.rmtree(work / "ours", ignore_errors=True)
    return [
        sys.executable, "-m", "data_tools.pretokenize", "--input", str(given), "--tokenizer", str(work / model_type),
        "--output", str(work / "ours"), "--workers", str(workers), *options,
    ]  # fmt: skip


def bare(work: Path, given: Path, model_type: str, threads: int) -> list[str]:
    """Return the command of the bare side."""
    model = str(work / model_type / "tokenizer.model")
    return [sys.executable, "-c", BARE, model, str(given), str(work / "bare.bin"), str(threads)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=user_path,
        required=True,
        help="folder for results, input and tokenizers; a second call continues",
    )
    parser.add_argument("--megabytes", type=int, default=240, help="megabytes of text (default 240)")
    parser.add_argument("--vocab-size", type=int, default=32000, help="default 32000")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument(
        "--memory-gigabytes", type=float, help="measure memory at this much text instead, with 2 workers"
    )
    arguments = parser.parse_args()
    if min(arguments.megabytes, arguments.repeats) < 1:
        raise LimeError("--megabytes and --repeats must be at least 1")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "repeats")}
    results = read_results(arguments.output, settings)
    work = arguments.output.resolve()
    given = work / "input"
    make_input(given, arguments.megabytes)
    for model_type in ("bpe", "unigram"):
        make_tokenizer(work / model_type, given, model_type, arguments.vocab_size)
    size = sum(len(text.encode()) for *_, text in documents(list_inputs(str(given)), "text", Tally())) / 1e6
    if arguments.memory_gigabytes:
        lines = measure_memory(work, given, size, arguments, settings, results)
    else:
        lines = measure_speed(work, given, size, arguments, settings, results)
    table = "\n".join(lines) + "\n"
    write(arguments.output / "table.md", table)
    print(table)


def measure_speed(
    work: Path,
    given: Path,
    size: float,
    arguments: argparse.Namespace,
    settings: dict[str, object],
    results: dict[str, list[list[float]]],
) -> list[str]:
    """Run both sides in turn, first the one with fewer runs."""
    cases = [(kind, workers) for kind in ("bpe", "unigram") for workers in (1, 2)]
    for repeat in range(arguments.repeats):
        for kind, workers in cases:
            for side, command in (("bare", bare), ("ours", ours)):
                runs = results.setdefault(f"{kind} {workers} {side}", [])
                if len(runs) <= repeat:
                    runs.append(list(measure(command(work, given, kind, workers))))
                    print(f"{kind}, {workers} worker(s), {side}: {runs[-1][0]:.2f} s, {runs[-1][1]:.0f} MB", flush=True)
                    write_results(arguments.output, settings, results)
    lines = [
        "| model | workers | bare, MB/s | ours, MB/s | ratio | bare, peak MB | ours, peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, workers in cases:
        sides = [results[f"{kind} {workers} {side}"] for side in ("bare", "ours")]
        seconds = [statistics.median(run[0] for run in side) for side in sides]
        peaks = [max(run[1] for run in side) for side in sides]
        lines.append(
            f"| {kind} | {workers} | {size / seconds[0]:.1f} | {size / seconds[1]:.1f} | {seconds[0] / seconds[1]:.2f} | "
            f"{peaks[0]:.0f} | {peaks[1]:.0f} |"
        )
    return lines


def measure_memory(
    work: Path,
    given: Path,
    size: float,
    arguments: argparse.Namespace,
    settings: dict[str, object],
    results: dict[str, list[list[float]]],
) -> list[str]:
    """Run once over enough links to the input's files to hold the requested amount of text, and once with duplicates dropped."""
    many = work / "many"
    copies = -(-int(arguments.memory_gigabytes * 1000) // int(size))
    shutil.rmtree(many, ignore_errors=True)
    many.mkdir()
    for copy in range(copies):
        for file in list_inputs(str(given)):
            os.link(file.path, many / f"{copy:05d}-{file.name}")
    lines = ["| run | text, GB | seconds | MB/s | peak MB |", "|---|---|---|---|---|"]
    for name, options in (("unigram, 2 workers", []), ("the same, --drop-duplicates", ["--drop-duplicates"])):
        if name not in results:
            results[name] = [list(measure(ours(work, many, "unigram", 2, *options)))]
            write_results(arguments.output, settings, results)
        ((seconds, peak),) = results[name]
        text = size * copies
        lines.append(f"| {name} | {text / 1e3:.2f} | {seconds:.0f} | {text / seconds:.1f} | {peak:.0f} |")
    shutil.rmtree(many)
    return lines


if __name__ == "__main__":
    run_command(main)
