"""Protects the equations: the decoder equals plain loops, and LLaMA equals that of transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from support import reference
from support.models import MODELS, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.equality import perturb
from lime_dist import build_decoder
from lime_dist.config.schema import LimeConfig, ModelConfig, RopeScalingConfig
from lime_dist.model.architecture import GROUPS, architecture_of, stage_layout
from lime_dist.model.decoder import decoder_layers, open_history, run_layers
from lime_dist.model.layers import language_model_loss, scaled_frequencies


def perturb_and_draw(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Move the parameters off their initial values; return tokens [3, 7] and weights [3, 7, V] for a sum of logits."""
    for name, parameter in model.named_parameters():
        perturb(name, parameter)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 31, (3, 7), generator=generator)
    return tokens, torch.randn(3, 7, 31, generator=generator, dtype=torch.float64)


@cache
def by_plain_loops(model: str, tied: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradient of every parameter, from the plain reference."""
    config = small(**MODELS[model], tie_word_embeddings=tied)
    decoder = build_decoder(config, dtype=torch.float64)
    tokens, weight = perturb_and_draw(decoder)
    copies = {name: p.detach().clone().requires_grad_() for name, p in decoder.named_parameters()}
    logits = reference.logits(config, copies, tokens)
    (logits * weight).sum().backward()
    return logits.detach(), {name: copy.grad for name, copy in copies.items()}


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model", MODELS)
def test_forward_and_all_gradients_equal_plain_loops(model: str, tied: bool, checkpointing: bool) -> None:
    """11 layers: more than one block, the last of which is incomplete; 7 tokens."""
    config = small(**MODELS[model], tie_word_embeddings=tied)
    decoder = build_decoder(config, dtype=torch.float64, activation_checkpointing=checkpointing)
    tokens, weight = perturb_and_draw(decoder)
    logits = decoder(tokens)
    (logits * weight).sum().backward()
    wanted, gradients = by_plain_loops(model, tied)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-11)
    assert {name for name, _ in decoder.named_parameters()} == set(gradients)
    for name, parameter in decoder.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max() / gradients[name].abs().max()
        assert error < 1e-9, f"{name}: {error:.1e}"


@pytest.mark.parametrize("model", ["llama", "lime kv, G=3", "lime kv, chunked", "lime static", "hyper dynamic"])
def test_a_step_computes_on_the_device_of_its_parameters(model: str) -> None:
    """On a GPU, a tensor made on the CPU is an error, or a copy for which the host waits."""

    class Devices(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.seen.update(leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor))
            return result

    config, meta = small(**MODELS[model]), torch.device("meta")
    with meta:
        layers = [spec.make() for spec in decoder_layers(config)[1:-2]]
    hidden = torch.empty(3, 7, *architecture_of(config).hidden_shape, device=meta, requires_grad=True)
    history = open_history(config, stage_layout(config, range(config.num_hidden_layers)), 3 * 7, hidden.dtype, meta)
    with Devices() as devices:
        out, _ = run_layers(layers, hidden, history, False)
        out.backward(torch.empty_like(out))
    assert devices.seen == {"meta"}


@pytest.mark.parametrize("groups", [3, 1])
def test_chunked_with_a_summary_row_for_every_layer_is_full(groups: int) -> None:
    """With rank = chunk size, A = identity and first = 0, summaries are copies of the slots."""
    full = build_decoder(small(num_key_value_heads=groups), dtype=torch.float64)
    history = {"policy": "chunked", "chunk_size": 4, "rank": 4, "first": 0}
    chunked = build_decoder(small(num_key_value_heads=groups, lime={"history": history}), dtype=torch.float64)
    for name, parameter in full.named_parameters():
        perturb(name, parameter)
    theirs = dict(full.named_parameters())

    def counterpart(name: str, of: dict[str, Tensor]) -> Tensor:
        """The full model's counterpart of a chunked model's parameter (or gradient): R's columns are split into Q and R."""
        if ".router." not in name:
            return of[name]
        layer = int(name.split(".")[2])
        columns = (layer - layer % 4) * groups
        if name.endswith("summary_weight"):
            return of[name.replace("summary_weight", "weight")][:, :columns]
        return of[name][:, columns:]

    for name, parameter in chunked.named_parameters():
        is_summary = name.startswith("model.history.chunks.")
        parameter.data.copy_(torch.eye(4 * groups) if is_summary else counterpart(name, theirs).detach())
    tokens = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(5))
    losses = [language_model_loss(model(tokens), tokens) for model in (full, chunked)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-13)
    gradients = {name: parameter.grad for name, parameter in full.named_parameters()}
    compared = 0
    for name, parameter in chunked.named_parameters():
        if not name.startswith("model.history.chunks."):
            wanted = counterpart(name, gradients)
            assert (parameter.grad - wanted).abs().max() <= 1e-12 * wanted.abs().max(), name
            compared += wanted.numel()
    assert compared == sum(parameter.numel() for parameter in full.parameters())


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize(("rope", "tied"), [("default", True), ("default", False), ("linear", True), ("llama3", False)])
def test_llama_gives_the_logits_of_transformers(rope: str, tied: bool) -> None:
    """With llama3, also beyond the original length."""
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    shape = {"rope_theta": 50000.0, "rms_norm_eps": 1e-6, "num_attention_heads": 3, "tie_word_embeddings": tied}
    config = small(architecture="llama", rope_scaling=ROPES[rope], **shape)
    ours = build_decoder(config)
    for name, parameter in ours.named_parameters():
        perturb(name, parameter)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=11, num_key_value_heads=3,
            rope_scaling=dict(ROPES[rope]) or None, **shape,
        )
    )  # fmt: skip
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, "the exported names are Hugging Face's"
    tokens = torch.randint(0, 31, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_scaled_frequencies_are_those_of_transformers() -> None:
    """Of Llama 3.1: some are kept, some interpolated, some divided."""
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = {**ROPES["llama3"], "original_max_position_embeddings": 8192}
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](
        transformers.LlamaConfig(
            hidden_size=4096,
            num_attention_heads=32,
            max_position_embeddings=131072,
            rope_theta=5e5,
            rope_scaling=dict(values),
        )
    )
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    ours = scaled_frequencies(plain, RopeScalingConfig(**values))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ratio = ours / plain
    assert ratio[0] == 1 and ratio[-1] == 1 / 8 and ((ratio > 0.126) & (ratio < 0.999)).any()


def test_lime_starts_as_llama_with_identity_routers() -> None:
    llama = build_decoder(small(architecture="llama"), seed=3, dtype=torch.float64)
    lime = build_decoder(small(lime=LimeConfig(router_init="identity")), seed=3, dtype=torch.float64)
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(lime(tokens), llama(tokens), rtol=0, atol=1e-12)


def test_initial_values_depend_on_seed_and_name_only() -> None:
    """A model with another vocabulary has the same values in parameters of the same shape."""
    first, second = build_decoder(small(), seed=7), build_decoder(small(vocab_size=40), seed=7)
    other = build_decoder(small(), seed=8)
    name = "model.layers.4.self_attn.q_proj.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    values = {n: p.flatten()[:20] for n, p in first.named_parameters() if p.numel() >= 20 and "norm" not in n}
    assert len({tuple(v.tolist()) for v in values.values()}) == len(values), "no two parameters share their numbers"


def test_initial_values_follow_the_design() -> None:
    config = ModelConfig(vocab_size=500, hidden_size=128, num_hidden_layers=8, num_attention_heads=4)
    weights = dict(build_decoder(config).named_parameters())
    assert weights["model.layers.3.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["model.layers.3.mlp.down_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert weights["model.layers.3.self_attn.o_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert weights["model.norm.weight"].eq(1).all()
    router = weights["model.layers.5.self_attn.router.weight"]
    assert router.shape == (4, 24) and torch.equal(router[:, 20:], torch.eye(4))
    bound = (3 / 24) ** 0.5
    assert router[:, :20].abs().max().item() <= bound and router[:, :20].abs().max().item() > 0.8 * bound
    assert "model.layers.0.self_attn.router.weight" not in weights


def test_every_parameter_is_in_exactly_one_group() -> None:
    groups = {
        name: architecture_of(small()).parameter_group(name) for name, _ in build_decoder(small()).named_parameters()
    }
    assert set(groups.values()) == set(GROUPS)
    assert groups["model.layers.1.self_attn.router.weight"] == "routers"
    assert groups["model.embed_tokens.weight"] == groups["model.layers.0.input_layernorm.weight"] == "plain"
    assert groups["model.layers.0.self_attn.k_proj.weight"] == "matrices"
    with pytest.raises(ValueError, match="no optimizer group"):
        architecture_of(small()).parameter_group("model.layers.0.bias")


def test_the_flat_list_reads_as_the_model() -> None:
    names = [spec.name for spec in decoder_layers(small(num_hidden_layers=2, tie_word_embeddings=False))]
    assert names == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
