"""Protects the layer history: exact gradients, one buffer, slots written once, misuse refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.policies import POLICIES
from support.reference import mix
from torch import Tensor

from benchmarks.training_step import LiveBytes
from lime_dist.config.schema import LimeConfig, ModelConfig
from lime_dist.model.architectures.lime.hidden.history import HiddenHistory
from lime_dist.model.architectures.lime.kv.history import KeyValueHistory
from lime_dist.model.chunks import summarised_chunks
from lime_dist.model.decoder import build_decoder
from lime_dist.model.history import LayerHistory
from lime_dist.model.layout import BLOCK, StageLayout
from lime_dist.model.norm_rotation import rms_norm
from lime_dist.model.policies import HistoryPolicy, make_policy

HEADS, SIZE, TOKENS = 2, 4, 3
ROUTES: dict[str, dict[str, Any]] = {
    "kv": {"routes": "kv"},
    "static": {"routes": "hidden"},
    "dynamic": {"routes": "hidden", "router": "dynamic"},
}
LONG = {"full": {"policy": "full"}, "chunked": {"policy": "chunked", "chunk_size": 8, "rank": 1, "first": 2}}


def run_history(policy: str, layers: int, *values: Tensor, keep: bool = True) -> Tensor:
    """All mixtures of a history of ``layers`` layers; values: k of all layers, v of all layers, the weights of its readers."""
    keys, slots_v, *weights = values
    layout = StageLayout(make_history_policy(policy), (range(layers),), layers)
    history = KeyValueHistory(layout, HEADS, SIZE, TOKENS, keys.dtype, keys.device, keep=keep)
    history.open([None, *weights[: layers - 1]], weights[layers - 1 :])
    mixed, chunks = [], {chunk.layers[-1]: chunk for chunk in layout.chunks}
    for layer in range(layers):
        mixed.append(torch.stack(history.mix(layer, keys[layer], slots_v[layer])))
        if layer in chunks:
            history.summarise(chunks[layer])
    return torch.stack(mixed)


def run_hidden_history(policy: str, layers: int, states: Tensor, *values: Tensor) -> Tensor:
    """Projected mixtures of all layers; values: projections of all layers, the weights of its readers."""
    projections, *weights = values
    layout = StageLayout(make_history_policy(policy, routes="hidden"), (range(layers),), layers, block=3)
    history = HiddenHistory(layout, TOKENS, SIZE, 1e-5, states.dtype, states.device, keep=True)
    history.open([weight.softmax(-1) for weight in weights[:layers]], weights[layers:])
    projected, chunks = [], {chunk.layers[-1]: chunk for chunk in layout.chunks}
    for layer in range(layers):
        history.write(layer, rms_norm(states[layer], None, 1e-5), states[layer])
        projected.append(history.project(layer, None, projections[layer]))
        if layer in chunks:
            history.summarise(chunks[layer])
    history.release()
    return torch.stack(projected)


def make_history_policy(policy: str, **lime: str) -> HistoryPolicy:
    return make_policy(LimeConfig.model_validate({"history": POLICIES[policy], **lime}))


def random_values(policy: str, layers: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layers)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, requires_grad=True)
    rule = make_history_policy(policy)
    slots = [draw(layers, TOKENS, HEADS, SIZE) for _ in range(2)]
    routers = [draw(HEADS, len(rule.reads(layer)) * HEADS) for layer in range(1, layers)]
    chunks = summarised_chunks(rule, layers)
    return [*slots, *routers, *(draw(chunk.num_rows * HEADS, len(chunk.layers) * HEADS) for chunk in chunks)]


@pytest.mark.parametrize("layers", [1, 3, BLOCK + 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradcheck(policy: str, layers: int) -> None:
    """Compares with finite differences; with ``keep``, because gradcheck runs backward over one graph many times."""
    values = random_values(policy, layers)
    torch.autograd.gradcheck(partial(run_history, policy, layers), values, fast_mode=layers > 3)


@pytest.mark.parametrize("layers", [1, 4, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradcheck_of_hidden_states(policy: str, layers: int) -> None:
    generator = torch.Generator().manual_seed(layers)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, requires_grad=True)
    rule = make_history_policy(policy, routes="hidden")
    weights = [draw(HEADS, len(rule.reads(layer))) for layer in range(layers)]
    weights += [draw(chunk.num_rows, len(chunk.layers)) for chunk in summarised_chunks(rule, layers)]
    values = [draw(layers, TOKENS, SIZE), draw(layers, HEADS, 2, SIZE), *weights]
    torch.autograd.gradcheck(partial(run_hidden_history, policy, layers), values, fast_mode=True)


@pytest.mark.parametrize("layers", [BLOCK, 2 * BLOCK + 3])
def test_mixtures_equal_nested_loops(layers: int) -> None:
    keys, slots_v, *routers = random_values("full", layers)
    mixtures = run_history("full", layers, keys, slots_v, *routers, keep=False)
    for layer in range(1, layers):
        for part, slots in enumerate((keys, slots_v)):
            wanted = mix(routers[layer - 1], [slot.unsqueeze(0) for slot in slots[: layer + 1]])[0]
            torch.testing.assert_close(mixtures[layer, part], wanted.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_backward_runs_once_over_a_history() -> None:
    out = run_history("full", 3, *random_values("full", 3), keep=False).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run only once over a layer history"):
        out.backward()


def test_layers_write_in_turn() -> None:
    layout = StageLayout(make_policy(LimeConfig()), (range(3),), 3)
    history = KeyValueHistory(layout, HEADS, SIZE, TOKENS, torch.float32, torch.device("cpu"))
    history.open([None, torch.randn(HEADS, 2 * HEADS), torch.randn(HEADS, 3 * HEADS)], [])
    slot = torch.randn(TOKENS, HEADS, SIZE)
    with pytest.raises(RuntimeError, match="out of order"):
        history.mix(1, slot, slot)
    history.mix(0, slot, slot)
    with pytest.raises(RuntimeError, match="out of order"):
        history.mix(0, slot, slot)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("routes", ["kv", "static", "dynamic"])
@pytest.mark.parametrize("policy", POLICIES)
def test_graph_memory_grows_linearly_with_depth(policy: str, routes: str, checkpointing: bool) -> None:
    """The bytes that autograd saves for backward plus the history's own double with the depth. Dynamic weights, one per
    token, head and entry read, are O(L²) by nature and are not counted."""

    def saved_bytes(layers: int) -> int:
        config = ModelConfig.model_validate(
            {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": layers,
             "num_attention_heads": 2, "lime": {**ROUTES[routes], "history": POLICIES[policy]}}
        )  # fmt: skip
        model = build_decoder(config, activation_checkpointing=checkpointing)
        storages = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}
        made: list[LayerHistory] = []

        def note(tensor: Tensor) -> Tensor:
            if routes != "dynamic" or tensor.shape[-1] == 32:
                storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerHistory, "__init__", remembering(made.append))
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                out = model(torch.zeros(2, 64, dtype=torch.long))
        for tensor in buffers(made[0]):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        total = sum(storages.values())
        del out
        return total

    small, middle, large = (saved_bytes(layers) for layers in (16, 32, 64))
    assert large - middle < 2.2 * (middle - small)


def buffers(history: LayerHistory) -> list[Tensor]:
    """All tensors that a history holds between forward and backward."""
    held: list[Any] = [*vars(history).values(), *getattr(history, "_states", {}).values()]
    return [value for value in held if isinstance(value, Tensor)]


def remembering(remember: Callable[[LayerHistory], object]) -> Callable[..., None]:
    """``LayerHistory.__init__`` that also hands the history to ``remember``."""
    create = LayerHistory.__init__

    def __init__(self: LayerHistory, *arguments: object, **options: object) -> None:
        create(self, *arguments, **options)
        remember(self)

    return __init__


@pytest.mark.parametrize("routes", ["kv", "static"])
@pytest.mark.parametrize("policy", POLICIES)
def test_peak_memory_of_a_step_grows_linearly_with_depth(policy: str, routes: str) -> None:
    """Counts all live bytes of forward and backward, including backward's buffers."""

    def peak(layers: int) -> int:
        config = ModelConfig.model_validate(
            {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": layers,
             "num_attention_heads": 2, "lime": {**ROUTES[routes], "history": POLICIES[policy]}}
        )  # fmt: skip
        model = build_decoder(config)
        gc.collect()
        with LiveBytes() as count:
            model(torch.zeros(2, 64, dtype=torch.long)).sum().backward()
        return count.peak

    small, middle, large = (peak(layers) for layers in (12, 24, 48))
    assert large - middle < 2.2 * (middle - small)


@pytest.mark.parametrize("routes", ["kv", "static"])
@pytest.mark.parametrize("policy", ["full", "chunked"])
def test_bf16_sums_of_128_readers_do_not_stagnate(policy: str, routes: str) -> None:
    """Layer 0's entry is read 128 times. In bf16, with 8 bits of precision, a sum stops growing when it is 256 times the
    summand. Here every reader adds the same, and the entry's gradient must equal float32's within bf16's rounding."""
    layers = 128

    def entry_gradient(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        rule = make_policy(LimeConfig.model_validate({"routes": ROUTES[routes]["routes"], "history": LONG[policy]}))
        reads = [len(rule.reads(layer)) for layer in range(layers)]
        sizes = [(chunk.num_rows, len(chunk.layers)) for chunk in summarised_chunks(rule, layers)]
        layout = StageLayout(rule, (range(layers),), layers)
        if routes == "kv":
            keys = torch.randn(layers, TOKENS, 1, SIZE, generator=generator).to(dtype).requires_grad_()
            history = KeyValueHistory(layout, 1, SIZE, TOKENS, dtype, keys.device)
            history.open([None, *(torch.ones(1, n, dtype=dtype) for n in reads[1:])],
                         [torch.full(size, 1 / 8, dtype=dtype) for size in sizes])  # fmt: skip
        else:
            keys = torch.randn(layers, TOKENS, SIZE, generator=generator).to(dtype).requires_grad_()
            history = HiddenHistory(layout, TOKENS, SIZE, 1e-5, dtype, keys.device)
            history.open([torch.ones(1, n, dtype=dtype) for n in reads],
                         [torch.zeros(size, dtype=dtype) for size in sizes])  # fmt: skip
        chunks = {chunk.layers[-1]: chunk for chunk in layout.chunks}
        total = torch.zeros((), dtype=torch.float32)
        for layer in range(layers):
            if routes == "kv":
                mixed = torch.stack(history.mix(layer, keys[layer], keys[layer]))
            else:
                history.write(layer, keys[layer], keys[layer])
                mixed = history.project(layer, None, torch.eye(SIZE, dtype=dtype).unsqueeze(0))
            total = total + mixed.float().sum()
            if layer in chunks:
                history.summarise(chunks[layer])
        history.release()
        total.backward()
        return keys.grad.float()

    expected, actual = entry_gradient(torch.float32), entry_gradient(torch.bfloat16)
    error = (actual[0] - expected[0]).abs().max() / expected[0].abs().max()
    assert expected[0].abs().max() > 100, "the case must be one in which bf16 would stagnate"
    assert error < 2**-7, f"{error:.1e}"


def test_an_exception_in_the_middle_leaves_nothing_behind() -> None:
    """A forward pass that fails half-way does not disturb the next one."""
    config = ModelConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2)
    model = build_decoder(config, dtype=torch.float64)
    tokens = torch.arange(8).view(1, 8)
    model(tokens).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens)
    handle.remove()
    with torch.no_grad():
        model(torch.cat([tokens, tokens]))
    model(tokens).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name


@pytest.mark.parametrize("routes", ["kv", "static", "dynamic"])
@pytest.mark.parametrize("policy", ["full", "chunked"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("ending", ["backward", "no backward", "no grad", "exception"])
def test_histories_are_freed(routes: str, policy: str, checkpointing: bool, ending: str) -> None:
    """A history and the autograd graph that uses it must not hold each other: such a cycle is never collected."""
    config = ModelConfig.model_validate(
        {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
         "lime": {**ROUTES[routes], "history": POLICIES[policy]}}
    )  # fmt: skip
    model = build_decoder(config, activation_checkpointing=checkpointing)
    made: list[weakref.ref[LayerHistory]] = []
    tokens = torch.arange(8).view(1, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerHistory, "__init__", remembering(lambda history: made.append(weakref.ref(history))))
        if ending == "exception":
            patch.setattr(type(model.model.layers[2].mlp), "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(tokens)
        elif ending == "no grad":
            with torch.no_grad():
                model(tokens)
        else:
            out = model(tokens)
            if ending == "backward":
                out.sum().backward()
            del out
    gc.collect()
    assert len(made) == 1 and made[0]() is None
