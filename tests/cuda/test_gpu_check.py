"""Protects the GPU's side of benchmarks/gpu_check.py, and transfers over gloo, as far as a GPU that computes nothing can show it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_gpu import NAME
from support.workers import WorkerGroup


@pytest.fixture
def group() -> Iterator[WorkerGroup]:
    """One process, which has the fake GPU until it ends."""
    group = WorkerGroup(1)
    yield group
    group.close()


@pytest.mark.slow
def test_sections_on_the_device(group: WorkerGroup, tmp_path: Path) -> None:
    """The model is trained on the device, results go to the CPU, and memory is what the device has counted."""
    (result,) = group.run("support.check_on_gpu.run_sections", folder=str(tmp_path))
    assert result["made"] == {NAME} and result["kept"] == {"cpu"}
    ((rows, _), (cluster, problems)) = result["memory"], result["cluster"]
    assert [row[0] for row in rows] == ["lime chunked"] and not problems
    assert [row[:3] for row in cluster] == [["lime_64_2x8", "8", "2"]]
    for ratio in (*rows[0][3:], cluster[0][-1]):
        assert 0.9 < float(ratio) < 1.3, "without the bytes of parameters and optimizer it would be about 0.1"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_gloo_gets_tensors_in_host_memory(group: WorkerGroup, rank: int) -> None:
    values = {
        "model": {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"sequence_length": 8},
        "train": {"global_batch_size": 2, "micro_batch_size": 1},
        "parallel": {"pipeline_stages": 2},
    }
    (given,) = group.run("support.check_on_gpu.transfers_over_gloo", values=values, rank=rank)
    assert given["isend"] == given["irecv"] == {"cpu"}
    assert given["send"] | given["recv"] == {"cpu"}, "DeepSpeed and the engine greet their neighbours"
