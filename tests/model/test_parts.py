"""Protects stages that hold several parts of the decoder: what crosses, and that in one process they equal the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline.test_equality import MODELS, ROUTES
from support.policies import POLICIES
from torch import Tensor

from benchmarks.equality import perturb
from benchmarks.staged import staged_logits
from lime_dist.config.load import make_config
from lime_dist.config.schema import LimeConfig
from lime_dist.model.architecture import stage_layout
from lime_dist.model.cost import payload_shape
from lime_dist.model.crossing import Cut, Prices, crossings, part_crossings
from lime_dist.model.decoder import Decoder, build_decoder, layer_name, open_history, run_layers
from lime_dist.model.layers import language_model_loss
from lime_dist.model.policies import Entry, HistoryPolicy, make_policy
from lime_dist.pipeline.payload import pack, unpack


def policy_of(history: dict[str, Any]) -> HistoryPolicy:
    return make_policy(LimeConfig.model_validate({"history": history}))


def even(layers: int, stages: int, parts: int) -> Cut:
    count = stages * parts
    return Cut(tuple(layers * part // count for part in range(count + 1)), stages)


# -- what crosses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "stages", "parts"), [(128, 8, 4), (128, 8, 2), (64, 4, 4), (24, 2, 3), (24, 3, 8), (9, 3, 3)]
)
def test_the_full_history_by_formula(layers: int, stages: int, parts: int) -> None:
    """Over all boundaries L(P − 1)(1 − 1/(2V)) entries, over one at most L(P − 1)/(PV); sent without a memory, L(PV − 1)/2."""
    cut = even(layers, stages, parts)
    counts = [len(each) for each in part_crossings(policy_of({"policy": "full"}), cut)]
    assert sum(counts) * 2 * parts == layers * (stages - 1) * (2 * parts - 1)
    assert max(counts) * stages * parts == layers * (stages - 1)
    naive = crossings(policy_of({"policy": "full"}), layers)
    assert 2 * sum(len(naive[bound]) for bound in cut.bounds) == layers * (stages * parts - 1)


def test_the_full_history_of_128_layers() -> None:
    full, cut = policy_of({"policy": "full"}), even(128, 8, 4)
    kept, naive = part_crossings(full, cut), [crossings(full, 128)[bound] for bound in cut.bounds]
    assert [sum(map(len, each)) for each in (naive, kept)] == [1984, 784]
    assert [max(map(len, each)) for each in (naive, kept)] == [124, 28]


def test_later_boundaries_of_first_last_carry_the_last_slots_alone() -> None:
    each = part_crossings(policy_of({"policy": "first_last", "first": 2, "last": 1}), even(32, 4, 4))
    assert [[entry.layer for entry in crossing.entries] for crossing in each[1:6]] == [
        [0, 1], [0, 1, 3], [0, 1, 5], [7], [9],
    ]  # fmt: skip
    assert all(len(crossing) == 1 for crossing in each[4:-1])


def test_finished_summaries_cross_only_the_stages_that_lack_them() -> None:
    """Chunks of two parts, on 3 stages: a summary is sent to the two other stages, and then nobody needs it."""
    cut = even(24, 3, 4)
    each = part_crossings(policy_of({"policy": "chunked", "chunk_size": 4, "rank": 1, "first": 0}), cut)
    summaries = [[entry.layer for entry in crossing.entries if entry.is_summary] for crossing in each]
    assert summaries[:8] == [[], [], [3], [3], [7], [7], [11], [11]]


def test_one_part_a_stage_is_the_usual_crossing() -> None:
    """Each entry goes as far as its last reader."""
    for history in POLICIES.values():
        policy, cut = policy_of(history), Cut((0, 2, 3, 7, 9), 4)
        usual = crossings(policy, 9)
        assert part_crossings(policy, cut) == tuple(usual[bound] for bound in cut.bounds)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(POLICIES)), st.integers(2, 4), st.integers(1, 4), st.data())
def test_every_stage_has_what_it_reads(policy: str, stages: int, parts: int, data: st.DataObject) -> None:
    """Follow the entries: a stage gets each at most once, sends only what it has, and has what its parts read."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=stages * parts, max_size=stages * parts))
    cut, rule = Cut((0, *accumulate(sizes)), stages), policy_of(POLICIES[policy])
    each = part_crossings(rule, cut)
    held: list[set[Entry]] = [set() for _ in range(stages)]
    for part, layers in enumerate(cut.parts):
        own, arriving = held[part % stages], set(each[part].entries)
        assert not own & arriving
        assert arriving <= held[(part - 1) % stages]
        own |= arriving | {Entry(layer) for layer in layers}
        own |= {e for layer in range(cut.bounds[-1]) for e in rule.reads(layer) if e.is_summary and e.layer in layers}
        assert {entry for layer in layers for entry in rule.reads(layer)} <= own
    assert not each[0].entries and not each[-1].entries


# -- equality in one process ----------------------------------------------------------------------------------------------

LAYERS, BATCH, LENGTH = 12, 2, 5
CUTS = [
    Cut((0, 3, 6, 9, 12), 2),
    Cut((0, 1, 2, 3, 4, 5, 6, 7, 12), 2),
    Cut((0, 4, 5, 6, 8, 11, 12), 3),
    Cut(tuple(range(13)), 4),
]
CASES: dict[str, dict[str, Any]] = {
    **{f"{routes}, {policy}": {"architecture": "lime", "lime": {**ROUTES[routes], "history": POLICIES[policy]}}
       for routes in ROUTES for policy in POLICIES},
    "long chunks": {"architecture": "lime", "lime": {"history": {"policy": "chunked", "chunk_size": 7, "rank": 2, "first": 1}}},
    "long chunks, hidden": {
        "architecture": "lime",
        "lime": {"routes": "hidden", "history": {"policy": "chunked", "chunk_size": 7, "rank": 2, "first": 1}},
    },
    **{name: MODELS[name] for name in MODELS if not name.startswith(("lime", "hidden static", "hidden dynamic"))},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens_BT() -> Tensor:
    return torch.randint(0, 31, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def make_decoder(model: dict[str, Any]) -> Decoder:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    heads = 4 if model.get("lime", {}).get("routes") == "hidden" else 2
    values = {**sizes, "num_attention_heads": 4, "num_key_value_heads": heads, **model}
    decoder = build_decoder(make_config({"model": values}, "a test").model, dtype=torch.float64)
    for name, parameter in decoder.named_parameters():
        perturb(name, parameter)
    return decoder


def check_parts(decoder: Decoder, tokens_BT: Tensor, cuts: Sequence[Cut]) -> None:
    whole = language_model_loss(decoder(tokens_BT), tokens_BT)
    whole.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    for index, cut in enumerate(cuts):
        decoder.zero_grad()
        decoder.activation_checkpointing = (False, True, "selective")[index % 3]
        logits = staged_logits(decoder, tokens_BT, cut.bounds, [torch.clone] * 3, [torch.clone] * 3, Prices(cut=cut))
        loss = language_model_loss(logits, tokens_BT)
        loss.backward()
        assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
        for name, parameter in decoder.named_parameters():
            error = (parameter.grad - wanted[name]).abs().max() / wanted[name].abs().max()
            assert error <= 1e-10, f"{name}, {cut}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_parts_equal_the_whole_model(case: str, tokens_BT: Tensor) -> None:
    """Loss and all gradients, for even and uneven parts, with and without checkpointing."""
    check_parts(make_decoder(CASES[case]), tokens_BT, CUTS)


@pytest.mark.parametrize("case", ["kv, full", "static, full", "attention residuals", "value residual", "moda"])
def test_a_missing_gradient_of_a_later_part_raises(case: str) -> None:
    """The backward pass of a stage's first part before that of its second."""
    decoder = make_decoder(CASES[case])
    config, cut = decoder.config, Cut((0, 3, 6, 9, 12), 2)
    history = open_history(
        config, stage_layout(config, *cut.of_stage(0), prices=Prices(cut=cut)), 4, torch.float64, torch.device("cpu")
    )
    assert history is not None
    hidden, released = run_layers(
        [decoder.get_submodule(layer_name(n)) for n in cut.parts[0]],
        torch.randn(2, 2, 16, dtype=torch.float64),
        history,
        False,
    )
    first = pack(hidden, released, history)
    history.begin_part(1)
    received = torch.randn(payload_shape(config, 6, 2, 2, Prices(cut=cut)), dtype=torch.float64, requires_grad=True)
    hidden = unpack(received, config.hidden_size, history)
    hidden, released = run_layers([decoder.get_submodule(layer_name(n)) for n in cut.parts[2]], hidden, history, False)
    second = pack(hidden, released, history)
    with pytest.raises(RuntimeError, match="lacks? "):
        first.sum().backward()
    del second
