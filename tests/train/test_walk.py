"""One configuration that uses what a training team asks for together: a run that is stopped in the middle ends as an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.folders import numbers, records, weights
from support.workers import WorkerGroup

from lime_dist.config.load import load_config

Workers = Callable[[int], WorkerGroup]
YAML = """
model:
  vocab_size: 320
  hidden_size: 16
  intermediate_size: 24
  num_hidden_layers: 6
  num_attention_heads: 4
  num_key_value_heads: 2
  lime: {history: {policy: chunked, chunk_size: 2, rank: 1, first: 1}}
  numerics: {qk_norm: true, logit_softcap: 30.0, residual_scale: 0.5}
data: {path: DATASET, sequence_length: 32, document_mask: true, validation: {again: DATASET}}
train:
  steps: 12
  global_batch_size: 8
  micro_batch_size: 1
  evaluation_interval: 4
  evaluation_samples: 4
  checkpoint_interval: 4
  log_interval: 2
  z_loss: 1.0e-4
optimizer: {name: muon, schedule: wsd, decay_share: 0.5, warmup_steps: 2}
parallel: {pipeline_stages: 2, zero_stage: 1, activation_checkpointing: [true, selective]}
monitor:
  samples: {prompts: [alpha beta, gamma], interval: 6, tokens: 4, temperature: 1.0}
  straggler_minutes: 0.5
  sinks: [wandb]
"""


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["zero_bubble", "interleaved"])
def test_everything_together(workers: Workers, dataset: Path, tmp_path: Path, schedule: str) -> None:
    """Two stages of two replicas, stopped by a signal to one process in step 7, and resumed."""

    def values(directory: Path) -> dict[str, Any]:
        path = tmp_path / "config.yaml"
        path.write_text(YAML.replace("DATASET", str(dataset)))
        overrides = [f"run.directory={directory}", f"pipeline.schedule={schedule}"]
        overrides += {
            "interleaved": ["parallel.virtual_stages=2"],
            "zero_bubble": ["parallel.offload_history=true", "pipeline.extra_in_flight=2"],
        }[schedule]
        settings: dict[str, Any] = yaml.safe_load(yaml.safe_dump(load_config(path, overrides).model_dump(mode="json")))
        return settings

    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    group = workers(4)
    assert set(group.run("support.runs.run_in", environment=offline, values=values(straight))) == {""}
    first = values(stopped)
    first["train"]["steps"] = 12
    ended = group.run("support.runs.observe", values={**first, "monitor": {**first["monitor"], "sinks": []}},
                      events=[{"do": "signal", "rank": 3, "step": 7}])  # fmt: skip
    assert {error for error, _ in ended} == {""} and "at step 7: saved" in ended[0][1]
    assert set(group.run("support.runs.run_in", environment=offline, values=values(stopped))) == {""}
    assert numbers(stopped) == numbers(straight)
    ours, theirs = weights(stopped, 12), weights(straight, 12)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [record["step"] for record in records(straight) if "sample_texts" in record] == [6, 12]
    last = [record for record in records(straight) if "validation_loss" in record][-1]
    assert last["validation_loss/again"] == last["validation_loss"]
    assert list(straight.glob("wandb/offline-run-*/run-*.wandb")) and json.dumps(last)
