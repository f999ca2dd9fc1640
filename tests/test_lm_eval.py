"""Protects evaluation with the LM Evaluation Harness: it opens an export, and its scores equal those of the trainer's decoder."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import run_values, write_random

from lime_dist.checkpoint import export
from lime_dist.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
ITEMS = [
    ("alpha beta", ["gamma", "delta", "mu nu"], 0),
    ("mu nu", ["xi", "omicron pi"], 1),
    ("rho", ["sigma", "tau"], 0),
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}, cache_dir: %s}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def log_likelihood(decoder: Decoder, tokenizer: Any, context: str, continuation: str) -> float:
    """Log-likelihood of a continuation's tokens by the trainer's decoder."""
    whole, start = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
    with torch.no_grad():
        log_probabilities = decoder(torch.tensor([whole]))[0].log_softmax(-1)
    return sum(log_probabilities[i - 1, whole[i]].item() for i in range(start, len(whole)))


@pytest.mark.slow
def test_the_harness_scores_an_export_as_the_decoder_does(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The items have different lengths, so the harness pads the batch."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    model = {"lime": {"history": {"policy": "chunked", "chunk_size": 2}}}
    _, decoder = write_random(run_values(dataset, tmp_path / "run", **model))
    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    lines = [json.dumps({"question": question, "choices": choices, "answer": a}) for question, choices, a in ITEMS]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local.yaml").write_text(TASK % (tmp_path / "items.jsonl", tmp_path / "cache"))
    evaluation = simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'out'},trust_remote_code=True,dtype=float32",
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
        batch_size=4,
        device="cpu",
        log_samples=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    right = 0
    for sample in evaluation["samples"]["local_choice"]:
        question, choices, answer = ITEMS[sample["doc_id"]]
        wanted = [log_likelihood(decoder, tokenizer, question, f" {choice}") for choice in choices]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(wanted, abs=1e-4)
        right += max(range(len(wanted)), key=wanted.__getitem__) == answer
    assert evaluation["results"]["local_choice"]["acc,none"] == pytest.approx(right / len(ITEMS))


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch/evaluate_paper.sh"), *arguments]
    environment = {**os.environ, "LIME_VENV": sys.prefix}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_papers_tasks_by_one_script(tmp_path: Path) -> None:
    """The task lists of both versions of the paper, with their shots. The harness, if installed, has every task."""
    finished = dry_run(str(tmp_path), "--dry-run", "--limit", "5")
    assert finished.returncode == 0, finished.stderr
    commands = [shlex.split(line) for line in finished.stdout.splitlines()]
    names: set[str] = set()
    for version, shots, command in zip("12", "13", commands, strict=True):
        options = dict(zip(command[1:-2:2], command[2:-2:2], strict=True))
        assert options["--model_args"] == f"pretrained={tmp_path},trust_remote_code=True"
        assert options["--num_fewshot"] == shots and options["--output_path"] == f"{tmp_path}-lm_eval/version{version}"
        assert len(options["--tasks"].split(",")) == 8 and command[-2:] == ["--limit", "5"]
        names.update(options["--tasks"].split(","))
    assert {"arc_easy", "winogrande", "copa", "multirc", "rte", "hellaswag", "piqa", "wic", "qnli"} <= names
    assert dry_run(str(tmp_path), "--dry-run", "--version", "1").stdout.count("\n") == 1
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        return
    assert names <= set(TaskManager().all_tasks)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: no model given"),
        (["--dry-run"], "error: no model given"),
        (["nowhere"], "error: no such folder: nowhere"),
        ([".", "--version", "3"], "error: --version takes 1 or 2, not '3'"),
    ],
)
def test_mistakes_of_the_script(arguments: list[str], line: str) -> None:
    finished = dry_run(*arguments)
    assert finished.returncode == 2 and finished.stderr.startswith(line) and finished.stderr.count("\n") == 1


def test_help_of_the_script() -> None:
    finished = dry_run("--help")
    assert finished.returncode == 0 and "bash launch/evaluate_paper.sh MODEL" in finished.stdout
