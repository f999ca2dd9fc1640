"""Measure how well models answer questions that need several steps: train them on a synthetic task and count equal solutions.

    python benchmarks/tasks.py arithmetic --output runs/arithmetic
    python benchmarks/tasks.py graph --output runs/graph --models llama lime-full --seeds 0 --steps 500

Makes the data (data_tools.tasks), trains every model from every seed with configs/tasks/TASK.yaml, exports it, and lets it answer
unseen questions (lime_dist.exact_match). Resumable: after a stop, the same command finishes the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from memories import MODELS
from pairs import mean_and_spread, mean_interval
from results import write
from runs import ROOT, Study, add_run_options

from data_tools.tasks.documents import MARK
from data_tools.tokenizer import Tokenizer
from lime_dist.errors import LimeError, run_command
from lime_dist.exact_match import exact_match
from lime_dist.export.exporting import export
from lime_dist.model.cost import count_parameters

TASKS: dict[str, dict[str, Any]] = {
    "arithmetic": {"options": ["--operands", "5"], "documents": 300_000, "vocab_size": 280},
    "graph": {"options": ["--concepts", "10", "--hops", "3"], "documents": 50_000, "vocab_size": 512},
}
"""Options of the questions, their number, and the size of the vocabulary, by task."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    add_run_options(parser, steps=1500)
    parser.add_argument("--models", nargs="+", default=["llama", "lime-full", "lime-static"], choices=sorted(MODELS),
                        metavar="MODEL", help=f"of {', '.join(sorted(MODELS))}")  # fmt: skip
    parser.add_argument("--documents", type=int, help="questions to train on (default: by task)")
    parser.add_argument("--questions", type=int, default=1000, help="questions for each model (default 1000)")
    arguments = parser.parse_intermixed_args()
    config = ROOT / f"configs/tasks/{arguments.task}.yaml"
    shards, tokenizer = make_data(arguments.output, arguments.task, arguments.documents)
    mark = tokenizer.facts["symbols"][MARK]
    shared = [f"model.vocab_size={tokenizer.vocab_size}", f"data.answer_token={mark}"]
    arguments.config, arguments.data = config, shards
    study = Study.from_options(arguments, shared, {name: MODELS[name] for name in arguments.models})
    study.run(arguments.jobs)
    seeds = study.finished_seeds()
    if not seeds:
        raise LimeError("no seed is finished for every model; run the same command again")
    folders = [study.folder(name, seed) for seed in seeds for name in study.variants]
    results = {folder.name: measure(folder, shards, arguments.questions) for folder in folders}
    table = make_table(study, seeds, results)
    (study.output / "table.md").write_text(table)
    print(table)


def make_data(output: Path, task: str, documents: int | None) -> tuple[Path, Tokenizer]:
    """Make the shards and the tokenizer of a task, reusing what is complete."""
    folder, settings = output.resolve() / "data", TASKS[task]
    text, tokenizer, shards = folder / "text", folder / "tokenizer", folder / "shards"
    count = str(documents or settings["documents"])
    for command in (
        ["tasks", task, "--output", text, "--documents", count, *settings["options"]],
        ["tokenizer", "train", "--input", text, "--output", tokenizer, "--symbol", MARK, "--sample-megabytes", "2",
         "--vocab-size", str(settings["vocab_size"])],
        ["pretokenize", "--input", text, "--tokenizer", tokenizer, "--output", shards, "--workers", "1",
         "--validation-fraction", "0.02"],
    ):  # fmt: skip
        finished = subprocess.run([sys.executable, "-m", f"data_tools.{command[0]}", *map(str, command[1:])], cwd=ROOT)
        if finished.returncode:
            raise LimeError(f"data_tools.{command[0]} ended with status {finished.returncode}, see above")
    return shards, Tokenizer(tokenizer)


def measure(run: Path, shards: Path, questions: int) -> dict[str, Any]:
    """Export a run and let it answer, unless this was done before. The result lies in the run's folder, and is deleted with it."""
    exported, path = run / "exported", run / "exact_match.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if earlier.get("asked") == questions:
        return earlier
    if not exported.exists():
        export(run, exported, None, "5GB")
    score = exact_match(exported, shards, "validation", questions, None, 256)
    print(f"{run.name}: {score.exact} of {score.questions} solutions, {score.final} final answers", flush=True)
    summary = {"asked": questions, **score.summary()}
    write(path, json.dumps(summary, indent=1) + "\n")
    return summary


def make_table(study: Study, seeds: list[int], results: dict[str, Any]) -> str:
    """Return the table over seeds: mean ± standard deviation, and the 95 % interval (Student) of the difference from the first model."""
    seeded = f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"
    lines = [
        f"| model, {seeded} | whole solution, % | more than the first | final answer, % | validation loss | parameters | s/step |",
        "|---|---|---|---|---|---|---|",
    ]
    base: list[float] | None = None
    for name in study.variants:
        scores = [results[study.folder(name, seed).name] for seed in seeds]
        exact, final = ([100 * one[key]["share"] for one in scores] for key in ("exact", "final"))
        more = "" if base is None else difference([a - b for a, b in zip(exact, base, strict=True)])
        base = base or exact
        seconds = statistics.median(
            record["step_seconds"] for seed in seeds for record in study.records(name, seed) if "step_seconds" in record
        )
        lines.append(
            f"| {name} | {mean_and_spread(exact, digits=1)} | {more} | {mean_and_spread(final, digits=1)} | "
            f"{mean_and_spread(study.losses(name, seeds))} | {count_parameters(study.model(name).model):,} | {seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def difference(paired: list[float]) -> str:
    """Return the mean of paired differences, with its interval if there are several."""
    text = f"{statistics.fmean(paired):+.1f}"
    if len(paired) < 2:
        return text
    low, high = mean_interval(paired)
    return f"{text} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    run_command(main)
