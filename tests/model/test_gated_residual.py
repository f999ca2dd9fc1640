"""Protects gated residuals: a special case, the sizes of gates, and what an export shows of the streams."""

from __future__ import annotations

import torch
from support.models import small

from benchmarks.equality import perturb
from lime_dist import build_decoder
from lime_dist.model.architecture import architecture_of

TOKENS = torch.arange(14).view(2, 7)


def test_with_gates_half_open_it_is_llama() -> None:
    """W_u = 0 and W_w = 0 give G = ½ and s = 1. All streams then equal the residual stream of a LLaMA whose norms are half as large."""
    config = small(architecture="gated_residual", gated_residual={"rate": 3})
    model, llama = (
        build_decoder(config, dtype=torch.float64),
        build_decoder(small(architecture="llama"), dtype=torch.float64),
    )
    for name, parameter in llama.named_parameters():
        perturb(name, parameter)
    norms = {
        "attn_connection": "input_layernorm",
        "mlp_connection": "post_attention_layernorm",
        "model.norm": "model.norm",
    }
    for name, parameter in model.named_parameters():
        if name.endswith(("expand_proj.weight", "write_proj.weight")):
            parameter.data.zero_()
        elif name.endswith("norm.norm.weight") or "connection.norm" in name:
            own = name.removesuffix(".norm.weight")
            theirs = next(own.replace(ours, llamas) for ours, llamas in norms.items() if ours in own)
            parameter.data.copy_(2 * llama.get_parameter(f"{theirs}.weight").data)
        elif not name.endswith("compress_proj.weight"):
            parameter.data.copy_(llama.get_parameter(name))
    torch.testing.assert_close(model(TOKENS), llama(TOKENS), rtol=0, atol=1e-12)


def test_a_read_has_a_bottleneck_of_an_eighth() -> None:
    sizes = architecture_of(small(architecture="gated_residual")).layer_parameters(0)
    own = {name.partition("attn_connection.")[2]: size for name, size in sizes.items() if name.startswith("attn_conn")}
    assert own == {
        "norm.weight": 4 * 24, "compress_proj.weight": 4 * 24 * 3, "expand_proj.weight": 4 * 24 * 3, "write_proj.weight": 4 * 4 * 24,
    }  # fmt: skip


def test_groups() -> None:
    model = build_decoder(small(architecture="gated_residual"))
    group_of = architecture_of(model.config).parameter_group
    assert group_of("model.norm.norm.weight") == group_of("model.layers.2.mlp_connection.norm.weight") == "plain"
    assert group_of("model.layers.2.mlp_connection.write_proj.weight") == "matrices"
    assert all(group_of(name) in ("plain", "matrices") for name, _ in model.named_parameters())
