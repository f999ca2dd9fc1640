"""Protects that everything runs on a GPU: whole steps of every architecture, policy and kind of stage, on a GPU that computes nothing.

A tensor on the wrong device is an error there, as on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from support.fake_gpu import NAME, Wait
from support.models import MODELS
from support.on_gpu import Case
from support.workers import WorkerGroup

ARCHITECTURES = ["llama", "lime kv, G=3", "lime static from layer 4", "lime dynamic", "hyper static", "hyper dynamic"]
STAGES = {"first": (0, 3), "middle": (1, 3), "last": (2, 3), "only": (0, 1)}
"""By kind: index, and number of stages."""
OPTIONS: dict[str, Sequence[Any]] = {
    "architecture": ARCHITECTURES,
    "stage": list(STAGES),
    "precision": ["bf16", "fp32"],
    "replicas": [1, 2],
    "tied": [False, True],
    "checkpointing": [False, True, "selective"],
    "wire": [None, "bf16", "fp8"],
    "batch": [2, 1],
    "schedule": ["1f1b", "zero_bubble", "interleaved"],
}
PROCESSES = 2
pytestmark = pytest.mark.slow  # all tests together
Row = dict[str, Any]


def every_pair(options: dict[str, Sequence[Any]]) -> list[Row]:
    """Few rows that have each pair of values of two options, found greedily."""
    rows = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    pairs = {row_id: set(combinations(row.items(), 2)) for row_id, row in enumerate(rows)}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(pairs, key=lambda row_id: len(pairs[row_id] & missing))
        chosen.append(rows[best])
        missing -= pairs[best]
    return chosen


def other_models() -> Iterator[Row]:
    """The remaining models, with options in turn."""
    for index, name in enumerate(sorted(MODELS.keys() - set(ARCHITECTURES))):
        yield {option: values[index // 2 % len(values) if option == "stage" else index % len(values)]
               for option, values in OPTIONS.items()} | {"architecture": name}  # fmt: skip


def values_of(row: Row) -> dict[str, Any]:
    """Seven layers, so that stages cut chunks; two micro-batches."""
    _, stages = STAGES[row["stage"]]
    return {
        "model": {
            "architecture": "lime", "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 7,
            "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": row["tied"],
            **MODELS[row["architecture"]],
        },
        "data": {"sequence_length": 8},
        "train": {
            "global_batch_size": 2 * row["batch"] * row["replicas"], "micro_batch_size": row["batch"],
        },
        "parallel": {
            "pipeline_stages": stages, "zero_stage": row["replicas"] - 1, "activation_checkpointing": row["checkpointing"],
            "virtual_stages": 2 if row["schedule"] == "interleaved" else 1,
        },
        "pipeline": {"wire_dtype": row["wire"], "schedule": row["schedule"]},
        "precision": row["precision"],
    }  # fmt: skip


def case_of(row: Row) -> Case:
    stage, stages = STAGES[row["stage"]]
    return Case("train", values_of(row), stage + stages * (row["replicas"] - 1), stages * row["replicas"])


ROWS = [*every_pair(OPTIONS), *other_models()]
EXPORTS = {
    name: Case("export", values_of({**ROWS[0], "architecture": name, "stage": "only", "precision": "fp32"}), 0, 1)
    for name, model in MODELS.items()
    if model.get("architecture") != "llama"  # its export is transformers' own model
}


WAITING = Case(
    "train",
    {
        **values_of({**ROWS[0], "architecture": "lime static from layer 4", "stage": "middle", "replicas": 1, "schedule": "1f1b"}),
        "train": {"global_batch_size": 8, "micro_batch_size": 1},
        "parallel": {"pipeline_stages": 3, "offload_history": True},
        "pipeline": {"extra_in_flight": 3},
    },
    1,
    3,
)  # fmt: skip
"""Histories wait on the host: of five micro-batches in flight."""


@pytest.fixture(scope="module")
def results() -> list[Any]:
    """Of the cases of `ROWS`, then of `EXPORTS`, then of `WAITING`: results, or the traceback of what went wrong. Two processes play them."""
    cases = [*map(case_of, ROWS), *EXPORTS.values(), WAITING]

    def share(first: int) -> list[Any]:
        group = WorkerGroup(1)
        try:
            own = cases[first::PROCESSES]
            parts = [own[begin : begin + 8] for begin in range(0, len(own), 8)]  # a call must end within `TIMEOUT`
            return [result for part in parts for result in group.run("support.on_gpu.play", cases=part)[0]]
        finally:
            group.close()

    results: list[Any] = [None] * len(cases)
    with ThreadPoolExecutor() as threads:
        for first, own in enumerate(threads.map(share, range(PROCESSES))):
            results[first::PROCESSES] = own
    return results


@pytest.mark.parametrize("index", range(len(ROWS)), ids=[", ".join(map(str, row.values())) for row in ROWS])
def test_training_evaluation_and_checkpoint(results: list[Any], index: int) -> None:
    """The host waits once a step and once an evaluation, when it reads what it must know. Everything that the optimizer holds is on
    the device, and everything that a checkpoint writes is not."""
    result = results[index]
    assert isinstance(result, dict), result
    assert result["stage"] == STAGES[ROWS[index]["stage"]][0]
    assert result["step"] == [Wait("copy to the host", "pipeline/engine.py: train_step")]
    assert result["evaluation"] == [Wait("read", "pipeline/engine.py: evaluate")]
    assert result["after the last wait"] == result["after the evaluation"] == 0, "the host waits when all is queued"
    assert result["devices"] == {NAME} and result["snapshot"] <= {"cpu"}
    assert result["snapshot"] or ROWS[index]["replicas"] == 2, "a replica may own nothing"


@pytest.mark.parametrize("index", range(len(EXPORTS)), ids=list(EXPORTS))
def test_exported_models(results: list[Any], index: int) -> None:
    assert results[len(ROWS) + index] == {NAME}


def test_the_host_does_not_wait_for_histories_that_move(results: list[Any]) -> None:
    assert isinstance(result := results[-1], dict), result
    assert result["step"] == [Wait("copy to the host", "pipeline/engine.py: train_step")]
    assert result["evaluation"] == [Wait("read", "pipeline/engine.py: evaluate")]
    assert result["moved"] > 0 == results[0]["moved"]


def test_a_whole_run(dataset: Path, tmp_path: Path) -> None:
    """As pretrain.py does it, with the loader that pins, records, router pictures, a validation and a checkpoint."""
    values = values_of({**ROWS[0], "architecture": "lime kv", "stage": "only", "replicas": 1, "checkpointing": False})
    values["model"]["vocab_size"] = 320
    values["data"]["path"] = str(dataset)
    values["run"] = {"directory": str(tmp_path / "run")}
    values["train"] |= {"steps": 3, "evaluation_samples": 4, "evaluation_interval": 0, "log_interval": 1}
    group = WorkerGroup(1)
    try:
        ((waits,),) = group.run("support.on_gpu.play", cases=[Case("run", values, 0, 1)])
    finally:
        group.close()
    assert isinstance(waits, dict), waits
    assert waits.pop(Wait("copy to the host", "pipeline/engine.py: train_step")) == 3
    assert waits.pop(Wait("read", "pipeline/engine.py: evaluate")) == 1
    assert waits.pop(Wait("copy to the host", "train/stage_optimizer.py: _set")), "the snapshot for the checkpoint"
    assert all("checkpoint/saver.py" in wait.where or wait.what == "all_gather_object" for wait in waits), waits
