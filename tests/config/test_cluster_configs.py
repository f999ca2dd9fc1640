"""Protects the configurations for clusters: the memory and transferred bytes in their comments equal the formulas."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from lime_dist import load_config
from lime_dist.config.deepspeed import batch_split
from lime_dist.config.schema import Config
from lime_dist.doctor.transferred_bytes import bytes_between_hosts
from lime_dist.model.cost import count_parameters
from lime_dist.pipeline.partition import memory_costs, stage_bounds
from lime_dist.plan.stage_times import boundary_bytes

CONFIGS = Path(__file__).resolve().parents[2] / "configs/cluster"
GPU_BYTES = 80e9


def largest_stage(config: Config) -> float:
    costs = memory_costs(config)
    return max(costs(stage)[begin, end] for stage, (begin, end) in enumerate(pairwise(stage_bounds(config))))


def numbers(config: Config, nodes: int) -> list[str]:
    """The lines with figures in a configuration's comment."""
    hosts = [f"node{rank // 8}" for rank in range(8 * nodes)]
    width, micro_batches = batch_split(config, len(hosts))
    payloads = {f"{size / 1e6:.1f}" for size in boundary_bytes(config)}
    own, other = (bytes_between_hosts(config, hosts, name) / 1e9 for name in ("stages_together", "replicas_together"))
    stages = config.parallel.pipeline_stages
    return [
        f"{count_parameters(config.model) / 1e9:.2f} B parameters; {stages} stages × {width} "
        f"{'replica' if width == 1 else 'replicas'}; {micro_batches} micro-batches per step. "
        f"A GPU needs up to {largest_stage(config) / 1e9:.1f} GB, less",
        f"what ZeRO-1 saves. Each boundary carries {', '.join(sorted(payloads))} MB per micro-batch each way; "
        f"nodes exchange {own:.1f} GB per step",
        f"({other:.1f} GB with topology: replicas_together).",
    ]


@pytest.mark.parametrize("name", ["lime_64_2x8", "lime_128_2x8", "lime_64_8x8", "lime_128_8x8"])
def test_figures_in_comments(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config, nodes = load_config(path), int(name.rsplit("_", 1)[1].partition("x")[0])
    comment = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
    assert comment[1:4] == numbers(config, nodes)
    assert config.model.num_hidden_layers == int(name.split("_")[1])
    assert f"on {nodes} nodes of 8 GPUs" in comment[0]


def test_every_configuration_is_tested_and_fits() -> None:
    """A fifth of the GPU's memory stays free for what no formula counts."""
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert len(paths) == 4
    for path in paths:
        assert largest_stage(load_config(path)) < 0.8 * GPU_BYTES, path.name
