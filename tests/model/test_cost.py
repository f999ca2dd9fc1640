"""Protects the formulas: predicted parameters, FLOPs, entries, and bytes of history and activations equal the counted ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.models import NUMERICS
from support.policies import POLICIES
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from lime_dist import build_decoder
from lime_dist.config.schema import ModelConfig
from lime_dist.model import cost
from lime_dist.model.architecture import architecture_of, model_crossings, stage_layout
from lime_dist.model.architectures.attention_residuals.history import DepthHistory
from lime_dist.model.architectures.hyper.modules.permutations import permutation_matrices
from lime_dist.model.architectures.value_residual.history import FirstValues
from lime_dist.model.crossing import ENTRIES, Prices
from lime_dist.model.decoder import (
    Decoder,
    apply_head,
    apply_norm,
    embed,
    later_readers,
    open_history,
    run_layers,
)
from lime_dist.model.history import LayerHistory
from lime_dist.model.layers import rotary_table
from lime_dist.model.logits import LogitForm
from lime_dist.model.loss import projected_loss
from lime_dist.model.weight_gradients import WeightGradients, deferring
from lime_dist.pipeline.payload import pack, unpack

BATCH, LENGTH, LAYERS = 2, 8, 11

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "num_key_value_heads": 2},
    "value residual": {"architecture": "value_residual", "num_key_value_heads": 2},
    "value residual, learnable": {"architecture": "value_residual", "value_residual": {"learnable": True}},
    "hyper static": {"architecture": "hyper", "hyper": {"rate": 2, "dynamic": False}},
    "hyper dynamic": {"architecture": "hyper", "hyper": {"rate": 3}},
    "gated residual": {"architecture": "gated_residual", "gated_residual": {"rate": 3}},
    "gated residual, one stream": {"architecture": "gated_residual", "gated_residual": {"rate": 1}},
    "hyper doubly stochastic": {"architecture": "hyper", "hyper": {"connection": "doubly_stochastic", "rate": 3}},
    "hyper permutations": {"architecture": "hyper", "hyper": {"connection": "permutations", "rate": 3}},
    "hyper permutations, one stream": {"architecture": "hyper", "hyper": {"connection": "permutations", "rate": 1}},
    **{
        f"attention residuals, {size}": {
            "architecture": "attention_residuals",
            "attention_residuals": {"block_size": size},
        }
        for size in (1, 3)
    },
    "moda": {"lime": {"depth_attention": "moda"}},
    **{
        f"moda, MLP, {name}": {
            "num_key_value_heads": 2,
            "lime": {"depth_attention": "moda", "mlp_entries": True, "history": POLICIES[name]},
        }
        for name in ("full", "last alone", "chunked, two rows")
    },
    "top_p": {"lime": {"routes": "hidden", "top_p": 0.5}},
    **{
        f"{name}, numerics": {**settings, "numerics": NUMERICS}
        for name, settings in {
            "llama": {"architecture": "llama", "num_key_value_heads": 2},
            "value residual": {"architecture": "value_residual"},
            "hyper": {"architecture": "hyper", "hyper": {"rate": 2}},
            "gated residual": {"architecture": "gated_residual"},
            "attention residuals": {"architecture": "attention_residuals", "num_key_value_heads": 2},
            "kv": {"num_key_value_heads": 2},
            "static": {"lime": {"routes": "hidden", "start_layer": 3}},
            "moda": {"num_key_value_heads": 2, "lime": {"depth_attention": "moda", "mlp_entries": True}},
        }.items()
    },
    **{f"kv, {name}": {"num_key_value_heads": 2, "lime": {"history": history}} for name, history in POLICIES.items()},
    **{
        f"static, {name}": {"lime": {"routes": "hidden", "start_layer": 3, "history": history}}
        for name, history in POLICIES.items()
    },
    **{
        f"dynamic, {name}": {"lime": {"routes": "hidden", "router": "dynamic", "history": history}}
        for name, history in POLICIES.items()
    },
}
KEY_VALUE = [name for name in MODELS if name.startswith("kv")]
MINIMAL = Prices(1, 1)
CUTS = [(0, LAYERS), (0, 5), (5, LAYERS), (4, 7)]


def make_config(model: str, **changes: Any) -> ModelConfig:
    values = {
        "vocab_size": 19, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    }  # fmt: skip
    return ModelConfig.model_validate({**values, **MODELS[model], **changes})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model", MODELS)
def test_parameters(model: str, tied: bool) -> None:
    config = make_config(model, tie_word_embeddings=tied)
    assert cost.count_parameters(config) == sum(p.numel() for p in build_decoder(config).parameters())


def stage_modules(decoder: Decoder, start: int, stop: int) -> list[nn.Module]:
    """The decoder layers of one stage, and the chunk summaries between them."""
    modules = [decoder.get_submodule(spec.name) for spec in decoder.specs]
    begin = next(i for i, spec in enumerate(decoder.specs) if spec.name == f"model.layers.{start}")
    end = begin
    while end < len(modules) - 2 and decoder.specs[end].name != f"model.layers.{stop}":
        end += 1
    return modules[begin:end]


def random_payload(
    config: ModelConfig, boundary: int, batch: int, length: int, dtype: torch.dtype, prices: Prices = ENTRIES
) -> Tensor:
    """A payload as received at the stage boundary before decoder layer ``boundary``."""
    return torch.randn(cost.payload_shape(config, boundary, batch, length, prices), dtype=dtype)


def entries_of(history: LayerHistory) -> Tensor:
    """The memory of a history's entries."""
    return history.first if isinstance(history, FirstValues) else history.entries


def count_flops(config: ModelConfig, start: int, stop: int, prices: Prices) -> tuple[float, float]:
    """Forward and backward FLOPs of one stage's decoder layers, counted by torch; the gradient of its output is random."""
    decoder = build_decoder(config)
    layers = stage_modules(decoder, start, stop)
    layout = stage_layout(config, range(start, stop), prices=prices)
    later = [decoder.get_submodule(spec.name) for spec in later_readers(config, layout)]
    history = open_history(config, layout, BATCH * LENGTH, torch.float32, torch.device("cpu"))
    if start:
        inputs = random_payload(config, start, BATCH, LENGTH, torch.float32, prices).requires_grad_()
        hidden = unpack(inputs, config.hidden_size, history)
    else:
        hidden = torch.randn(BATCH, LENGTH, *architecture_of(config).hidden_shape, requires_grad=True)

    # torch has no formula for the CPU's causal attention (masked pairs do not count) and for in-place matrix sums.
    pairs = (LENGTH + 1) / 2 / LENGTH
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda q, k, v, *_, out_shape=None, **__: pairs * sdpa_flop_count(q, k, v),
        torch.ops.aten.addmm_: lambda _, a, b, **__: mm_flop(a, b),
        backward: lambda g, q, k, v, *_, out_shape=None, **__: pairs * sdpa_backward_flop_count(g, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as forward_count:
        hidden, released = run_layers(layers, hidden, history, False, later)
        out = pack(hidden, released, history) if stop < config.num_hidden_layers else hidden
    with FlopCounterMode(display=False, custom_mapping=formulas) as backward_count:
        out.backward(torch.randn_like(out))
    return forward_count.get_total_flops(), backward_count.get_total_flops()


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(("model", "prices"), [*((m, ENTRIES) for m in MODELS), *((m, MINIMAL) for m in KEY_VALUE)])
def test_flops_of_a_stage(model: str, prices: Prices, cut: tuple[int, int]) -> None:
    """Some stages begin or end in the middle, so that received entries, partial mixtures, their gradients and unfinished chunks
    count."""
    config = make_config(model)
    layers = cost.layer_flops(config, LENGTH, range(*cut), prices)
    forward, backward = count_flops(config, *cut, prices)
    assert sum(flops.forward for flops in layers) * BATCH * LENGTH == forward
    assert sum(flops.backward for flops in layers) * BATCH * LENGTH == backward


@pytest.mark.parametrize("model", MODELS)
def test_what_is_left_for_a_weight_pass(model: str) -> None:
    """The FLOPs of the products that backward leaves, and the memory that they keep; every storage counts once."""
    config, left = make_config(model), WeightGradients()
    with deferring(left):
        out = build_decoder(config)(torch.zeros(BATCH, LENGTH, dtype=torch.int64))
    out.sum().backward()
    products = list(left._products)
    counted = sum(2 * each.input_NC.shape[1] * each.gradient_NC.shape[1] for each in products)
    assert counted == sum(flops.weights for flops in cost.layer_flops(config, LENGTH))
    memories = (tensor.untyped_storage() for each in products for tensor in (each.input_NC, each.gradient_NC))
    kept = {memory.data_ptr(): memory.nbytes() for memory in memories}
    assert sum(kept.values()) == sum(cost.weight_pass_bytes(config, i, BATCH * LENGTH, 4) for i in range(LAYERS))


@pytest.mark.parametrize("defers_weights", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_flops_of_what_selective_checkpointing_computes_again(model: str, defers_weights: bool) -> None:
    config, counted = make_config(model), []
    for checkpointing in (False, "selective"):
        decoder = build_decoder(config, activation_checkpointing=checkpointing)
        with deferring(WeightGradients() if defers_weights else None):
            loss = decoder(torch.zeros(BATCH, LENGTH, dtype=torch.int64)).sum()
        with FlopCounterMode(display=False) as count:
            loss.backward()
        counted.append(count.get_total_flops())
    of_layer = architecture_of(config).feed_forward_flops(defers_weights)
    assert counted[1] - counted[0] == LAYERS * of_layer * BATCH * LENGTH


@pytest.mark.parametrize("model", ["llama", "hyper static", "gated residual"])
def test_flops_of_the_head(model: str) -> None:
    config = make_config(model)
    decoder = build_decoder(config)
    hidden = torch.randn(BATCH, LENGTH, *architecture_of(config).hidden_shape, requires_grad=True)
    with FlopCounterMode(display=False) as count:
        apply_head(config, decoder.model.norm, decoder.model.embed_tokens, hidden).sum().backward()
    assert cost.head_flops(config).both * BATCH * LENGTH == count.get_total_flops()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_history_and_payload(model: str, precision: torch.dtype) -> None:
    config = make_config(model)
    tokens = BATCH * LENGTH
    for boundary in range(1, LAYERS):
        layout = stage_layout(config, range(boundary))
        history = open_history(config, layout, tokens, precision, torch.device("cpu"))
        counted = 0
        if history is not None:
            if isinstance(history, FirstValues):
                history.write(torch.zeros(BATCH, LENGTH, config.key_value_heads * config.head_size, dtype=precision))
            counted = entries_of(history).nbytes
            assert len(history.layout.outgoing.entries) == cost.boundary_entries(config, boundary)
            if architecture_of(config).history_gradient_itemsize(precision.itemsize):
                counted += history.gradients.nbytes
        assert cost.history_bytes(config, range(boundary), tokens, precision.itemsize) == counted
        hidden = torch.zeros(BATCH, LENGTH, *architecture_of(config).hidden_shape, dtype=precision)
        if history is None or config.lime.routes == "hidden":
            sent = [torch.zeros(tokens, config.hidden_size, dtype=precision)] * cost.boundary_entries(config, boundary)
        else:
            sent = history.release()
        payload = pack(hidden, sent, history)
        assert payload.nbytes == cost.payload_bytes(config, boundary, tokens, precision.itemsize)


@pytest.mark.parametrize("model", KEY_VALUE)
def test_bytes_of_partial_mixtures(model: str) -> None:
    """What crosses every boundary, and the memory of the stage behind it."""
    config = make_config(model)
    for boundary in range(1, LAYERS):
        crossing = model_crossings(config, MINIMAL)[boundary]
        layout = stage_layout(config, range(boundary, LAYERS), prices=MINIMAL)
        history = open_history(config, layout, 6, torch.float32, torch.device("cpu"))
        assert history.entries.nbytes == cost.history_bytes(config, range(boundary, LAYERS), 6, 4, MINIMAL)
        sent = len(crossing.entries) + len(crossing.mixtures)
        assert cost.payload_bytes(config, boundary, 6, 4, MINIMAL) == 6 * 4 * (
            16 + sent * architecture_of(config).entry_width
        )
        assert sent <= cost.boundary_entries(config, boundary)


def test_the_last_stage_of_a_full_history_holds_a_quarter() -> None:
    """Its 8 slots and 8 partial mixtures instead of 64 slots."""
    config = make_config("kv, full", num_hidden_layers=64)
    last, minimal = (cost.history_bytes(config, range(56, 64), 10, 2, prices) for prices in (ENTRIES, MINIMAL))
    assert minimal == last / 4


SHAPES: list[tuple[int, int, dict[str, int], list[tuple[int, int]]]] = [
    (2, 8, {}, CUTS),
    (3, 20, {"hidden_size": 24, "intermediate_size": 44, "vocab_size": 37}, CUTS[::3]),
]
"""Samples of a micro-batch, tokens per sample, sizes of the model, stages."""


class KeptMemory:
    """The memory that autograd saves while ``counting``; every storage counts once. It keeps memory, and no part of the graph, which
    would keep it in turn, so that neither would ever be freed.

    Args:
        ignored: tensors whose memory does not count.
    """

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._kept: dict[int, Tensor] = {}

    def counting(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(lambda tensor: self.add(tensor).detach(), lambda tensor: tensor)

    def add(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._ignored:
            self._kept.setdefault(address, tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def count_activations(
    decoder: Decoder, start: int, stop: int, batch: int, length: int, dtype: torch.dtype, checkpointing: bool
) -> int:
    """Bytes that a stage keeps after a forward pass, without the history's entries: for the payload, embedding, layers, and
    the head with the loss, as far as the stage has them."""
    config, device = decoder.config, torch.device("cpu")
    lead = batch * length * config.hidden_size if start else 0
    history = open_history(config, stage_layout(config, range(start, stop)), batch * length, dtype, device, lead)
    rotary = rotary_table(length, config.head_size, config.rope_theta, config.rope_scaling, dtype, device)
    permutations = permutation_matrices(min(config.hyper.rate, 4), torch.float32, device)
    kept = KeptMemory([*decoder.parameters(), *rotary, permutations])
    if isinstance(history, DepthHistory):
        kept.add(history.inverse_EN)
    tokens, labels = (torch.randint(config.vocab_size, (batch, length)) for _ in range(2))
    with kept.counting():
        if start:
            payload = random_payload(config, start, batch, length, dtype)
            if architecture_of(config).receives_in_place:
                payload = history.landing(tuple(payload.shape)).copy_(payload)
            hidden = unpack(kept.add(payload.requires_grad_()), config.hidden_size, history)  # a leaf is kept too
        else:
            hidden = embed(config, decoder.model.embed_tokens, tokens)
        hidden, _ = run_layers(stage_modules(decoder, start, stop), hidden, history, checkpointing)
        if stop == config.num_hidden_layers:
            norm, head = (decoder.get_submodule(spec.name) for spec in decoder.specs[-2:])
            hidden = projected_loss(apply_norm(config, norm, hidden), head.weight, labels, form=LogitForm.of(config))
    if history is None:
        return kept.bytes
    kept.add(entries_of(history))
    return kept.bytes - entries_of(history).nbytes


@pytest.mark.parametrize("checkpointing", [False, True, "selective"], ids=["all", "checkpointed", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_of_activations(model: str, dtype: torch.dtype, checkpointing: bool) -> None:
    """Compared stage by stage, so that errors of different layers cannot cancel."""
    for batch, length, sizes, cuts in SHAPES:
        config = make_config(model, **sizes)
        decoder = build_decoder(config, dtype=dtype)
        micro_batch = (batch * length, dtype.itemsize)
        for start, stop in cuts:
            layers = range(start, stop)
            predicted = sum(cost.activation_bytes(config, layer, *micro_batch, checkpointing) for layer in layers)
            if start:
                predicted += cost.received_activation_bytes(config, start, *micro_batch, checkpointing)
            else:
                predicted += cost.embedding_activation_bytes(batch * length)
            if stop == LAYERS:
                predicted += cost.head_activation_bytes(config, *micro_batch)
            counted = count_activations(decoder, start, stop, batch, length, dtype, checkpointing)
            assert predicted == counted
