"""Protects maps of weights that depend on the token: their means are those of the equations, in any pipeline, and training does not
notice that they are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.exports import perturbed
from support.folders import numbers, values
from support.models import means_of, small
from support.workers import WorkerGroup
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import architecture_of
from lime_dist.model.mean_weights import remainder
from lime_dist.monitor.routers import head_map, router_map

Workers = Callable[[int], WorkerGroup]
TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("size", [1, 3, 100])
@torch.no_grad()
def test_attention_residuals_by_the_equations(size: int) -> None:
    """A cell is the mean weight with which an output enters a read: that of its block, over the outputs of a layer that exist."""
    config = small(architecture="attention_residuals", attention_residuals={"block_size": size}, num_hidden_layers=4)
    decoder = perturbed(config, dtype=torch.float64)
    weights = dict(decoder.named_parameters())
    blocks, block_of, running = [decoder.model.embed_tokens(TOKENS)], list[int](), list[Tensor]()
    rows: dict[int, list[Tensor]] = {layer: [] for layer in range(4)}

    def read(layer: int, name: str, sources: list[Tensor]) -> Tensor:
        own = f"model.layers.{layer}.{name}_residual."
        if own + "query" not in weights:
            shares = torch.ones(1, *TOKENS.shape, dtype=torch.float64)
        else:
            gain = weights[own + "key_layernorm.weight"]
            keys = [reference.rms_norm(source, gain, config.rms_norm_eps) for source in sources]
            shares = torch.stack([key @ weights[own + "query"] for key in keys]).softmax(0)
        by_layer = torch.zeros(5, dtype=torch.float64)
        by_layer[0] = shares[0].mean()
        for other in range(4):
            of_layer = [shares[block].mean() for sublayer, block in enumerate(block_of) if sublayer // 2 == other]
            by_layer[1 + other] = torch.stack(of_layer).mean() if of_layer else 0.0
        rows[layer].append(by_layer)
        return (shares.unsqueeze(-1) * torch.stack(sources)).sum(0)

    for sublayer in range(8):
        layer, prefix = sublayer // 2, f"model.layers.{sublayer // 2}."
        if sublayer % size == 0 and running:
            blocks, running = [*blocks, sum(running)], []
        mixed = read(layer, "mlp" if sublayer % 2 else "attn", [*blocks, sum(running)] if running else blocks)
        norm = "post_attention_layernorm" if sublayer % 2 else "input_layernorm"
        normed = reference.rms_norm(mixed, weights[f"{prefix}{norm}.weight"], config.rms_norm_eps)
        output = (
            reference.mlp(config, weights, prefix, normed)
            if sublayer % 2
            else reference.attention(config, weights, prefix, layer, normed, {})
        )
        running.append(output)
        block_of.append(1 + sublayer // size)
    read(3, "output", [*blocks, sum(running)])

    means = means_of(decoder, TOKENS)
    for layer, wanted in rows.items():
        of_layer = head_map(config, means, layer)
        torch.testing.assert_close(of_layer.double(), torch.stack(wanted), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(router_map(config, means)[layer], of_layer.mean(0))


CASES: dict[str, dict[str, Any]] = {
    "attention residuals": {"architecture": "attention_residuals", "attention_residuals": {"block_size": 3}},
    "dynamic": {"num_key_value_heads": 4, "lime": {"routes": "hidden", "router": "dynamic", "start_layer": 2}},
    "moda": {"lime": {"depth_attention": "moda", "history": {"policy": "chunked", "chunk_size": 2, "rank": 1, "first": 1}}},
}  # fmt: skip


def test_no_share_is_negative() -> None:
    """Where the other entries have all of the weight but for rounding, 0 is left."""
    assert remainder(torch.tensor([[2.0, 1.0 + 1e-6], [0.5, 1.0]]), 3).tolist() == [[0.0], [1.5]]


def settings(dataset: Path, directory: Path, case: str, router_interval: int, **parallel: Any) -> dict[str, Any]:
    config = values(dataset, directory, steps=4, **parallel)
    config["model"] |= CASES[case]
    config["optimizer"] |= {"lr": 0.05, "warmup_steps": 0}  # queries start at 0, and means as those of equal weights
    config["monitor"] = {"router_interval": router_interval, "router_layer": 3, "peak_flops": 1e9}
    config["train"] |= {"micro_batch_size": 2 // parallel.get("replicas", 1), "checkpoint_interval": 4}
    config["parallel"].pop("replicas", None)
    config["train"]["evaluation_samples"] = config["parallel"].pop("evaluation_samples", 4)
    config["pipeline"] = {"schedule": "interleaved"} if "virtual_stages" in parallel else {}
    return config | {"precision": "fp64"}


@pytest.mark.parametrize("case", CASES)
def test_means_are_the_same_in_any_pipeline(case: str, workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """One process, two stages of two parts each, two replicas; without maps, losses are the same to the last bit. A run without
    validation draws none."""
    runs: dict[str, tuple[int, int, dict[str, int]]] = {
        "one": (1, 2, {}),
        "parts": (2, 2, {"pipeline_stages": 2, "virtual_stages": 2}),
    }
    if case == "attention residuals":
        runs |= {"replicas": (2, 2, {"replicas": 2}), "no maps": (2, 0, runs["parts"][2])}
    if case == "dynamic":
        runs["no validation"] = (1, 2, {"evaluation_samples": 0})
    drawn: dict[str, EventAccumulator] = {}
    for name, (size, interval, parallel) in runs.items():
        folder = tmp_path / name
        results = workers(size).run(
            "support.runs.observe", values=settings(dataset, folder, case, interval, **parallel)
        )
        assert [error for error, _ in results] == [""] * size
        drawn[name] = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    kind = architecture_of(ModelConfig.model_validate(CASES[case])).row_kind
    one = drawn.pop("one")
    for name in {"no maps", "no validation"} & drawn.keys():
        assert not drawn.pop(name).Tags()["images"]
    tags = [f"{figure}/layer{layer}" for figure in ("self_retrieval", "entropy") for layer in range(5)]
    for events in drawn.values():
        assert set(events.Tags()["images"]) == {"routers/layers", f"routers/{kind}s_of_layer3"}
        for tag in tags:
            wanted = [event.value for event in one.Scalars(tag)]
            assert len(wanted) == 2 and [e.value for e in events.Scalars(tag)] == pytest.approx(wanted, rel=1e-5)
    assert one.Scalars("entropy/layer4")[-1].value > 0.1
    if case == "attention residuals":
        assert numbers(tmp_path / "no maps") == numbers(tmp_path / "parts")
