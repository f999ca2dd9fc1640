"""Protects the layer history: exact gradients, one buffer, slots written once, misuse refused."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from support.reference import mix
from torch import Tensor

from lime_dist.config.schema import LimeConfig, ModelConfig
from lime_dist.model.decoder import build_decoder
from lime_dist.model.history import LayerHistory
from lime_dist.model.key_value_history import KeyValueHistory
from lime_dist.model.layout import BLOCK, StageLayout, live_entries
from lime_dist.model.policies import make_policy

HEADS, SIZE, TOKENS = 2, 4, 3


def run_history(layers: int, *values: Tensor, keep: bool = True) -> Tensor:
    """All mixtures of a history of ``layers`` layers; values: k of all layers, v of all layers, then the routers."""
    keys, slots_v, *routers = values
    layout = StageLayout(make_policy(LimeConfig()), 0, layers, layers)
    history = KeyValueHistory(layout, HEADS, SIZE, TOKENS, keys.dtype, keys.device, keep=keep)
    history.open([None, *routers], [])
    mixed = [torch.stack(history.mix(layer, keys[layer], slots_v[layer])) for layer in range(layers)]
    return torch.stack(mixed)


def random_values(layers: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layers)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, requires_grad=True)
    slots = [draw(layers, TOKENS, HEADS, SIZE) for _ in range(2)]
    return [*slots, *(draw(HEADS, (layer + 1) * HEADS) for layer in range(1, layers))]


@pytest.mark.parametrize("layers", [1, 3, BLOCK + 2])
def test_gradcheck(layers: int) -> None:
    """Against finite differences; ``keep`` because gradcheck walks one graph backwards many times."""
    values = random_values(layers)
    torch.autograd.gradcheck(partial(run_history, layers), values, fast_mode=layers > 3)


@pytest.mark.parametrize("layers", [BLOCK, 2 * BLOCK + 3])
def test_mixtures_equal_nested_loops(layers: int) -> None:
    keys, slots_v, *routers = random_values(layers)
    found = run_history(layers, keys, slots_v, *routers, keep=False)
    for layer in range(1, layers):
        for part, slots in enumerate((keys, slots_v)):
            wanted = mix(routers[layer - 1], [slot.unsqueeze(0) for slot in slots[: layer + 1]])[0]
            torch.testing.assert_close(found[layer, part], wanted.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_a_history_is_walked_backwards_once() -> None:
    out = run_history(3, *random_values(3), keep=False).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="walked backwards once"):
        out.backward()


def test_layers_write_in_turn() -> None:
    layout = StageLayout(make_policy(LimeConfig()), 0, 3, 3)
    history = KeyValueHistory(layout, HEADS, SIZE, TOKENS, torch.float32, torch.device("cpu"))
    history.open([None, torch.randn(HEADS, 2 * HEADS), torch.randn(HEADS, 3 * HEADS)], [])
    slot = torch.randn(TOKENS, HEADS, SIZE)
    with pytest.raises(RuntimeError, match="out of turn"):
        history.mix(1, slot, slot)
    history.mix(0, slot, slot)
    with pytest.raises(RuntimeError, match="out of turn"):
        history.mix(0, slot, slot)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_graph_memory_grows_linearly_with_depth(checkpointing: bool) -> None:
    """Bytes that autograd saves for backward, counted: doubling the depth doubles them, it does not quadruple them."""

    def saved_bytes(layers: int) -> int:
        config = ModelConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2
        )
        model = build_decoder(config, activation_checkpointing=checkpointing)
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(torch.zeros(2, 16, dtype=torch.long))
        total = sum(storages.values())
        del out
        return total

    small, middle, large = (saved_bytes(layers) for layers in (16, 32, 64))
    assert large - middle < 2.2 * (middle - small)


def test_an_exception_in_the_middle_leaves_nothing_behind() -> None:
    """A forward that dies half-way does not disturb the next one."""
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


@pytest.mark.parametrize("routes", ["kv", "hidden"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("ending", ["backward", "no backward", "no grad", "exception"])
def test_histories_are_freed(routes: str, checkpointing: bool, ending: str) -> None:
    """A history and the autograd graph that uses it must not hold each other: such a circle is never collected."""
    config = ModelConfig.model_validate(
        {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
         "lime": {"routes": routes}}
    )  # fmt: skip
    model = build_decoder(config, activation_checkpointing=checkpointing)
    made: list[weakref.ref[LayerHistory]] = []
    create = LayerHistory.__init__

    def remembered(self: LayerHistory, *arguments: object, **options: object) -> None:
        create(self, *arguments, **options)
        made.append(weakref.ref(self))

    tokens = torch.arange(8).view(1, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerHistory, "__init__", remembered)
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


def test_live_entries_of_the_full_history() -> None:
    policy = make_policy(LimeConfig())
    assert [len(live_entries(policy, boundary, 6)) for boundary in range(7)] == [0, 1, 2, 3, 4, 5, 0]
