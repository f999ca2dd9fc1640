"""Protects what the paper states: model sizes, training settings, special cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import reference

from benchmarks.equality import perturb
from lime_dist import build_decoder, load_config
from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError
from lime_dist.model.architecture import GROUPS, architecture_of
from lime_dist.model.architectures.lime.hidden.router import prune
from lime_dist.model.cost import count_parameters
from lime_dist.model.decoder import decoder_layers
from lime_dist.model.layers import language_model_loss

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def small(**changes: object) -> ModelConfig:
    values = {
        "vocab_size": 29,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
    }
    return ModelConfig.model_validate({**values, "hidden_size": 18, **changes})


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama", 1.1767),
        ("lime_dynamic", 1.1856),
        ("hyper_dynamic", 1.177),
        ("lime_static", 1.1768),
        ("lime_kv", 1.1769),
        ("value_residual", 1.1767),
        ("attention_residuals", 1.1770),
        ("moda", 1.1767),
    ],
)
def test_parameter_counts_of_the_paper(name: str, billions: float) -> None:
    """The paper states the first three; the others follow from the equations (their routers have 4,320 and 138,240 parameters).

    With the vocabulary of GPT-2, without the rows that our configurations add."""
    digits = len(str(billions).partition(".")[2])
    assert (
        round(
            count_parameters(load_config(CONFIGS / f"paper/{name}.yaml", ["model.vocab_size=50257"]).model) / 1e9,
            digits,
        )
        == billions
    )


@pytest.mark.parametrize(
    "model",
    [
        "llama",
        "lime_static",
        "lime_dynamic",
        "lime_kv",
        "hyper_dynamic",
        "value_residual",
        "attention_residuals",
        "moda",
    ],
)
def test_optimizer_settings_of_the_paper(model: str) -> None:
    config = load_config(CONFIGS / f"paper/{model}.yaml")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.router_lr, optimizer.min_lr, optimizer.warmup_steps) == (1e-3, 1e-2, 1e-6, 200)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.max_grad_norm) == (
        (0.9, 0.95),
        1e-8,
        0.1,
        1.0,
    )
    assert (config.data.sequence_length, config.train.global_batch_size, config.precision) == (2048, 1024, "bf16")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_parameter_of_every_configuration_has_a_group(path: Path) -> None:
    config = load_config(path).model
    with torch.device("meta"):
        names = [name for spec in decoder_layers(config) for name in spec.exported_names(spec.make()).values()]
    group_of = architecture_of(config).parameter_group
    assert all(group_of(name) in GROUPS for name in names)
    for name in names:
        learns_fast = ".router." in name or "dynamic_" in name
        assert (group_of(name) == "routers") == learns_fast
        decays = name.endswith("_proj.weight") or name == "lm_head.weight"
        assert (group_of(name) == "matrices") == decays


def test_dynamic_routing_with_equal_logits_is_static_routing_with_uniform_weights() -> None:
    dynamic = build_decoder(small(lime={"routes": "hidden", "router": "dynamic"}), dtype=torch.float64)
    static = build_decoder(small(lime={"routes": "hidden"}), dtype=torch.float64)
    for model in (dynamic, static):
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.data.zero_()
    tokens = torch.arange(14).view(2, 7)
    torch.testing.assert_close(dynamic(tokens), static(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rate", [1, 2, 4])
def test_hyper_starts_as_a_pre_norm_residual_decoder(rate: int, dynamic: bool) -> None:
    """At the initial values, all n streams equal one residual stream x ← x + f(LN(x)), where LN has no affine part. The last
    RMSNorm gets n·x, which equals RMSNorm of x with ε/n²."""
    config = small(architecture="hyper", hyper={"rate": rate, "dynamic": dynamic})
    model = build_decoder(config, dtype=torch.float64)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tokens = torch.arange(14).view(2, 7)
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        x = x + reference.attention(config, weights, prefix, layer, reference.layer_norm(x), {})
        x = x + reference.mlp(config, weights, prefix, reference.layer_norm(x))
    x = reference.rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps / rate**2)
    torch.testing.assert_close(model(tokens), x @ weights["model.embed_tokens.weight"].T, rtol=0, atol=1e-12)


def test_top_p_of_one_is_no_pruning() -> None:
    tokens = torch.arange(14).view(2, 7)
    pruned, whole = (build_decoder(small(lime={"routes": "hidden", "top_p": p})) for p in (1.0, None))
    assert torch.equal(pruned(tokens), whole(tokens))


def test_top_p_keeps_the_weight_that_crosses_the_threshold() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8], [0.25, 0.25, 0.25, 0.25]])
    for limit, kept in ((0.4, [1, 1, 2]), (0.5, [2, 1, 3]), (0.79, [2, 1, 4]), (0.91, [3, 3, 4]), (0.99, [4, 4, 4])):
        pruned = prune(weights.double(), limit)
        assert [(row > 0).sum().item() for row in pruned] == kept, limit
        torch.testing.assert_close(pruned.sum(-1), torch.ones(3, dtype=torch.float64))
    assert prune(weights, 0.7)[0, :2].tolist() == pytest.approx([0.625, 0.375])


def test_pruned_weights_get_no_gradient_and_kept_ones_do() -> None:
    model = build_decoder(small(lime={"routes": "hidden", "top_p": 0.5}), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        perturb(name, parameter)
    tokens = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(0))
    router = model.get_parameter("model.layers.4.self_attn.router.weight")
    kept = prune(router.softmax(-1), 0.5) > 0
    language_model_loss(model(tokens), tokens).backward()
    assert router.grad is not None and (router.grad[kept.sum(-1) > 1].abs().sum() > 0) and not kept.all()
    dropped_softmax_paths = router.grad[~kept].abs().max()
    assert dropped_softmax_paths < 1e-15, "renormalised over the kept ones, the softmax's denominator cancels"


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "llama"},
        {"lime": {"routes": "kv"}},
        {"lime": {"routes": "hidden"}},
        {"lime": {"routes": "hidden", "router": "dynamic"}},
        {"architecture": "hyper"},
        {"architecture": "gated_residual"},
        {"architecture": "hyper", "hyper": {"connection": "doubly_stochastic"}},
        {"architecture": "hyper", "hyper": {"connection": "permutations"}},
        {"architecture": "value_residual", "value_residual": {"learnable": True}},
        {"architecture": "attention_residuals"},
    ],
    ids=[
        "llama",
        "kv",
        "static",
        "dynamic",
        "hyper",
        "gated",
        "doubly stochastic",
        "permutations",
        "value residual",
        "attention",
    ],
)
def test_128_layers_have_finite_gradients(changes: dict[str, object], precision: torch.dtype) -> None:
    config = small(num_hidden_layers=128, hidden_size=48, intermediate_size=96, num_attention_heads=4, **changes)
    model = build_decoder(config, dtype=precision)
    tokens = torch.randint(0, 29, (2, 33), generator=torch.Generator().manual_seed(0))
    loss = language_model_loss(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Factors that start at 0, and what they multiply.
        may_be_zero = any(part in name for part in ("dynamic_", "scale", "key_layernorm"))
        assert parameter.grad.abs().max() > 0 or may_be_zero, name


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.lime.routes=hidden", "model.num_key_value_heads=2"], "model.num_key_value_heads=2 must equal"),
        (["model.lime.routes=hidden", "model.lime.router=dynamic", "model.lime.top_p=0.9"], "model.lime.top_p=0.9 needs model.lime.router=static"),
        (["model.lime.routes=hidden", "model.lime.start_layer=16"], "model.lime.start_layer=16 is past the last layer, 15"),
        (["model.lime.router=dynamic"], "model.lime.router=dynamic needs model.lime.routes=hidden"),
        (["model.lime.top_p=0.9"], "model.lime.top_p=0.9 needs model.lime.routes=hidden"),
        (["model.lime.start_layer=2"], "model.lime.start_layer=2 needs model.lime.routes=hidden"),
        (["model.lime.routes=hidden", "model.lime.router_init=identity"], "model.lime.router_init=identity needs"),
        (["model.lime.routes=hidden", "model.lime.top_p=1.5"], "model.lime.top_p=1.5 in the command line: input should be"),
        (["model.hyper.rate=0"], "model.hyper.rate=0"),
        (["model.architecture=hyper", "model.hyper={connection: permutations, dynamic: false}"], "model.hyper.dynamic=false needs model.hyper.connection=free"),
        (["model.architecture=hyper", "model.hyper={connection: permutations, rate: 7}"], "model.hyper.rate=7 has 5,040 permutations"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(LimeError) as caught:
        load_config(None, overrides)
    assert line in str(caught.value) and "\n" not in str(caught.value)
