"""Measure how much of a slow link to the Hugging Face hub `data_tools.pretokenize` uses. The hub is a stand-in on this machine.

    python benchmarks/hub_road.py --output runs/hub-road

The link is throttled, all connections together, to --rate. Its share is the bytes of content that came, divided by what it could have
sent: once over the whole command, with its start-up, and once from the first byte of content to the last. *Only reading*
selects one document in five hundred by a column, so that decompressing and filtering remain, but hardly any encoding. The whole
road encodes all documents: there the processor is the limit, and the same files from this machine's disk are the comparison.
Ranges that nobody reads tell what the throttle itself delivers.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pretokenize import make_input, make_tokenizer, measure
from results import read_results, write, write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path
from tests.support.hub import Hub

NAME = "someone/text"
README = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*\n---\n"
SELECTED = 0.002


def make_repository(folder: Path, given: Path, copies: int) -> None:
    """Write what the hub serves: the benchmark's input with a score in [0, 1), under several names."""
    if not (folder / "README.md").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "data").mkdir(parents=True)
        table = pa.concat_tables(pq.read_table(path) for path in sorted(given.glob("*.parquet")))
        score = pa.array(np.random.default_rng(0).random(len(table)))
        table = table.set_column(table.schema.get_field_index("score"), "score", score)
        path = folder / "data/000.parquet"
        pq.write_table(table, path, row_group_size=1000)
        for copy in range(1, copies):
            os.link(path, path.with_name(f"{copy:03d}.parquet"))
        (folder / "README.md").write_text(README)


class Window:
    """Watches when content came: from the first byte to the last."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._done = hub, threading.Event()
        self.first = self.last = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        before = 0
        while not self._done.wait(0.01):
            if self._hub.sent > before:
                self.last = time.perf_counter()
                self.first = self.first or self.last
                before = self._hub.sent

    def seconds(self) -> float:
        self._done.set()
        self._thread.join()
        return self.last - self.first


def over_the_link(hub: Hub, run: Callable[[], tuple[float, float]]) -> list[float]:
    """Run something.

    Returns:
        Its seconds and peak megabytes, the bytes and requests of content, the seconds that they took, and those of the processor.
    """
    hub.sent, window, before = 0, Window(hub), resource.getrusage(resource.RUSAGE_CHILDREN)
    hub.requests.clear()
    seconds, peak = run()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return [seconds, peak, float(hub.sent), float(hub.count("/content/")), window.seconds(), processor]


BARE = f"""
from data_tools.sources.hub_file import BLOCK, fetch
from data_tools.sources.inputs import list_inputs

for file in list_inputs("hub:{NAME}"):
    for first in range(0, file.size, BLOCK):
        fetch(file.path, file.size, first, min(first + BLOCK, file.size))
"""
"""Fetches all files in order, one range after the other, and reads nothing of them."""


def command(work: Path, given: str, workers: int, *options: str) -> list[str]:
    """The command of pretokenize, into an empty folder."""
    shutil.rmtree(work / "out", ignore_errors=True)
    return [
        sys.executable, "-m", "data_tools.pretokenize", "--input", given, "--tokenizer", str(work / "bpe"),
        "--output", str(work / "out"), "--workers", str(workers), *options,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=user_path, required=True, help="folder for results and input; a second call continues"
    )
    parser.add_argument("--megabytes", type=int, default=240, help="megabytes of text (default 240)")
    parser.add_argument("--copies", type=int, default=3, help="how often the hub has it, for reading (default 3)")
    parser.add_argument("--rate", type=float, default=50.0, help="the link, in MB/s (default 50)")
    arguments = parser.parse_args()
    if min(arguments.megabytes, arguments.copies, arguments.rate) < 1:
        raise LimeError("every number must be at least 1")
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    results, work = read_results(arguments.output, settings), arguments.output.resolve()
    make_input(work / "input", arguments.megabytes)
    make_tokenizer(work / "bpe", work / "input", "bpe", 32000)
    for name, copies in (("many", arguments.copies), ("once", 1)):
        make_repository(work / name, work / "input", copies)
    lines = [
        "| what | seconds | of the processor | MB over the link | share of the link | while content comes | requests a GB | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reading = ["--where", f"score<{SELECTED}", "--validation-fraction", "0.2"]
    hub_input = f"hub:{NAME}"
    rows: list[tuple[str, str, Callable[[], tuple[float, float]]]] = [
        ("ranges that nobody reads", "many", lambda: measure([sys.executable, "-c", BARE])),
        ("only reading, 1 worker", "many", lambda: measure(command(work, hub_input, 1, *reading))),
        ("only reading, 2 workers", "many", lambda: measure(command(work, hub_input, 2, *reading))),
        ("whole road, 2 workers", "once", lambda: measure(command(work, hub_input, 2))),
        ("the same from disk", "once", lambda: measure(command(work, str(work / "once/data"), 2))),
    ]
    for title, folder, run in rows:
        if title not in results:
            with Hub(NAME) as hub:
                hub.commit(work / folder)
                hub.rate = arguments.rate * 1e6
                os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "0"}
                results[title] = over_the_link(hub, run)
            write_results(arguments.output, settings, results)
        seconds, peak, sent, requests, window, processor = results[title]
        shares = [sent / 1e6 / arguments.rate / max(span, 1e-9) for span in (seconds, window)] if sent else [0.0, 0.0]
        lines.append(
            f"| {title} | {seconds:.1f} | {processor:.1f} | {sent / 1e6:.0f} | {shares[0]:.2f} | {shares[1]:.2f} | "
            f"{requests / max(sent / 1e9, 1e-9):.0f} | {peak:.0f} |"
        )
        print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    write(arguments.output / "table.md", table)
    print(table)


if __name__ == "__main__":
    run_command(main)
