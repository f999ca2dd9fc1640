"""Measure speed and memory of `data_tools.pretokenize` beside the bare encoders over the same files.

    python benchmarks/pretokenize.py --output runs/pretokenize
    python benchmarks/pretokenize.py --output runs/pretokenize-memory --memory-gigabytes 5

A bare side reads the parquet files, encodes batches of 64 documents to numpy and writes the ids to a file: no hashes, no index, no
fsync, no end-of-document token, no splits. sentencepiece and tokenizers do it in as many threads as there are workers, gigatoken, which
does not release the interpreter, in as many processes. All sides are whole commands, including start-up; they alternate, and ratios are
those of the medians. CPU seconds are those of all processes of a command, which other work on the machine changes less. Memory is the
sum of the resident pages of all processes of a command, the largest of samples every 50 ms.
"""

from __future__ import annotations

import argparse
import os
import resource
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

READ = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy, pyarrow.parquet as pq
model_file, given, output, workers = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def batches(first=0, step=1):
    files = [pq.ParquetFile(path) for path in sorted(given.glob("*.parquet"))]
    groups = [(file, group) for file in files for group in range(file.metadata.num_row_groups)]
    for file, group in groups[first::step]:
        for batch in file.iter_batches(64, row_groups=[group], columns=["text"]):
            yield batch.column(0).to_pylist()

def write(encode):
    with ThreadPoolExecutor(workers) as pool, open(output, "wb") as file:
        waiting = []
        for texts in batches():
            waiting.append(pool.submit(encode, texts))
            if len(waiting) > 4 * workers:
                for ids in waiting.pop(0).result():
                    file.write(ids.astype("<u2").data)
        for future in waiting:
            for ids in future.result():
                file.write(ids.astype("<u2").data)
"""
BARE = {
    "sentencepiece": """
import sentencepiece
model = sentencepiece.SentencePieceProcessor(model_file=model_file)
write(lambda texts: model.encode(texts, return_type="numpy", num_threads=1))
""",
    "tokenizers": """
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import sentencepiece
from lime_dist.export.tokenizer_files import byte_pair_tokenizer
model = byte_pair_tokenizer(sentencepiece.SentencePieceProcessor(model_file=model_file))
write(lambda texts: [numpy.asarray(one.ids) for one in model.encode_batch_fast(texts, add_special_tokens=False)])
""",
    "gigatoken": """
import gigatoken
children = []
for worker in range(workers):
    if pid := os.fork():
        children.append(pid)
        continue
    model = gigatoken.Tokenizer.from_sentencepiece(model_file).backend
    with open(f"{output}-{worker}", "wb") as file:
        for texts in batches(worker, workers):
            for text in texts:
                file.write(model.encode(text).astype("<u2").data)
    os._exit(0)
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
""",
}
"""What runs a bare encoder, after READ."""


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


def measure_with_cpu(command: list[str]) -> tuple[float, float, float]:
    """Return the seconds, peak megabytes and CPU seconds of a command with its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak = measure(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, peak, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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


def ours(work: Path, given: Path, model_type: str, encoder: str, workers: int, *options: str) -> list[str]:
    """Return the command of data_tools.pretokenize, into an empty folder."""
    shutil.rmtree(work / "ours", ignore_errors=True)
    return [
        sys.executable, "-m", "data_tools.pretokenize", "--input", str(given), "--tokenizer", str(work / model_type),
        "--output", str(work / "ours"), "--encoder", encoder, "--workers", str(workers), *options,
    ]  # fmt: skip


def bare(work: Path, given: Path, model_type: str, encoder: str, workers: int) -> list[str]:
    """Return the command of a bare encoder."""
    model = str(work / model_type / "tokenizer.model")
    return [sys.executable, "-c", READ + BARE[encoder], model, str(given), str(work / "bare.bin"), str(workers)]


SIDES = {
    "bpe": [
        ("bare sentencepiece", bare, "sentencepiece"),
        ("bare tokenizers", bare, "tokenizers"),
        ("bare gigatoken", bare, "gigatoken"),
        ("ours, sentencepiece", ours, "sentencepiece"),
        ("ours, gigatoken", ours, "gigatoken"),
    ],
    "unigram": [("bare sentencepiece", bare, "sentencepiece"), ("ours, sentencepiece", ours, "sentencepiece")],
}


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
    """Run all sides in turn, first those with fewer runs."""
    cases = [(kind, workers, *side) for workers in (1, 2) for kind in SIDES for side in SIDES[kind]]
    for repeat in range(arguments.repeats):
        for kind, workers, name, command, encoder in cases:
            runs = results.setdefault(f"{kind} {workers} {name}", [])
            if len(runs) <= repeat:
                runs.append(list(measure_with_cpu(command(work, given, kind, encoder, workers))))
                print(f"{kind}, {workers} worker(s), {name}: {runs[-1][0]:.2f} s, {runs[-1][1]:.0f} MB", flush=True)
                write_results(arguments.output, settings, results)
    lines = [
        "| model | workers | | MB/s | of bare sentencepiece | of the same encoder, bare | MB per CPU second | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, workers, name, _, encoder in cases:
        runs = results[f"{kind} {workers} {name}"]
        speeds = {
            side: size / statistics.median(run[0] for run in results[f"{kind} {workers} {side}"])
            for side in (name, "bare sentencepiece", f"bare {encoder}")
        }
        lines.append(
            f"| {kind} | {workers} | {name} | {speeds[name]:.1f} | {speeds[name] / speeds['bare sentencepiece']:.2f} | "
            f"{speeds[name] / speeds[f'bare {encoder}']:.2f} | {size / statistics.median(run[2] for run in runs):.1f} | "
            f"{max(run[1] for run in runs):.0f} |"
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
    for name, options in (("bpe, gigatoken, 2 workers", []), ("the same, --drop-duplicates", ["--drop-duplicates"])):
        if name not in results:
            results[name] = [list(measure(ours(work, many, "bpe", "gigatoken", 2, *options)))]
            write_results(arguments.output, settings, results)
        ((seconds, peak),) = results[name]
        text = size * copies
        lines.append(f"| {name} | {text / 1e3:.2f} | {seconds:.0f} | {text / seconds:.1f} | {peak:.0f} |")
    shutil.rmtree(many)
    return lines


if __name__ == "__main__":
    run_command(main)
