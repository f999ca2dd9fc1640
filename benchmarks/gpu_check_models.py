"""The models that `gpu_check.py` runs: every architecture, route and history policy, as overrides of the configuration."""

from __future__ import annotations

from lime_dist import load_config
from lime_dist.config.schema import Config

HIDDEN = ["model.lime.routes=hidden", "model.num_key_value_heads=4"]
DYNAMIC = [*HIDDEN, "model.lime.router=dynamic"]
FIRST_LAST = "model.lime.history={policy: first_last, first: 1, last: 1}"
CHUNKED = "model.lime.history={policy: chunked, chunk_size: 2, rank: 1, first: 1}"
DILATED = "model.lime.history={policy: dilated, stride: 2, first: 1, last: 1}"

MODELS: dict[str, list[str]] = {
    "llama": ["model.architecture=llama"],
    "lime full": [],
    "lime first_last": [FIRST_LAST],
    "lime chunked": [CHUNKED],
    "lime dilated": [DILATED],
    "hidden full": HIDDEN,
    "hidden first_last": [*HIDDEN, FIRST_LAST],
    "hidden chunked": [*HIDDEN, CHUNKED],
    "hidden dilated": [*HIDDEN, DILATED],
    "hidden top_p": [*HIDDEN, "model.lime.top_p=0.7", "model.lime.start_layer=2"],
    "dynamic full": DYNAMIC,
    "dynamic chunked": [*DYNAMIC, CHUNKED],
    "hyper static": ["model.architecture=hyper", "model.hyper.rate=2", "model.hyper.dynamic=false"],
    "hyper dynamic": ["model.architecture=hyper", "model.hyper.rate=2"],
    "mhc": ["model.architecture=hyper", "model.hyper={connection: doubly_stochastic, rate: 2}"],
    "mhc-lite": ["model.architecture=hyper", "model.hyper={connection: permutations, rate: 2}"],
    "gated residual": ["model.architecture=gated_residual", "model.gated_residual.rate=2"],
    "value residual": ["model.architecture=value_residual", "model.value_residual.learnable=true"],
    "moda": ["model.lime.depth_attention=moda"],
    "moda, MLP, chunked": ["model.lime.depth_attention=moda", "model.lime.mlp_entries=true", CHUNKED],
    "attention residuals": ["model.architecture=attention_residuals", "model.attention_residuals.block_size=3"],
}
"""By name. Policies have small numbers, so that a few layers already drop, summarise or skip entries."""

TRAINING = [
    "train.global_batch_size=4", "train.micro_batch_size=1", "train.steps=10", "optimizer.warmup_steps=2",
    "optimizer.max_grad_norm=0.05", "optimizer.lr=0.01", "optimizer.router_lr=0.1", "optimizer.eps=0.01",
    "pipeline.timeout=60",
]  # fmt: skip
"""Every step clips. With ε far above the clipped gradients an update is about lr · g / ε, so that errors of gradients show and
rounding errors of tiny ones are not amplified."""


def compared(model: str, sizes: list[str], *overrides: str) -> Config:
    """The configuration of a comparison of results."""
    return load_config(None, [*sizes, *TRAINING, *MODELS[model], *overrides])
