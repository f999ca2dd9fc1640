"""Cut the decoder layers into stages: contiguous, at least one layer each, the costliest stage as cheap as possible.

Cost is compute or memory (``parallel.balance``). A cut by compute may be slightly worse than the best one if that puts it at the
end of a chunk: fewer entries of a chunked history cross a boundary there than within a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from lime_dist.config.schema import Config
from lime_dist.model import cost
from lime_dist.model.architecture import architecture_of, chunk_ends, model_crossings
from lime_dist.model.crossing import sources_of_readers
from lime_dist.model.parameters import final_norm_parameters, layer_parameters
from lime_dist.model.policies import Entry
from lime_dist.model.transformer import EMBEDDING_WEIGHT, HEAD_WEIGHT
from lime_dist.pipeline.memory import ITEM_BYTES, MicroBatchBytes, histories_on_device
from lime_dist.pipeline.optimizer_memory import parameter_bytes
from lime_dist.pipeline.schedules.base import RECV_ACTIVATION, make_schedule
from lime_dist.pipeline.shared_weights import boundary_prices, router_parameters, summary_parameters

TOLERANCE = 0.05
"""For cuts at chunk ends the costliest stage may exceed that of the best cut by compute by this fraction."""
EARLY = 1e-3
"""The compute of the first stage counts this fraction more, that of later ones less of it: of cuts that are almost equal, the best one
gives the surplus layers to late stages, which hold fewer micro-batches in flight."""

Costs = npt.NDArray[np.float64]
"""[L + 1, L + 1]: the cost of a stage with layers begin … end−1; infinite unless begin < end."""


def stage_bounds(config: Config) -> list[int]:
    """[0, …, L]: part i holds decoder layers bounds[i] … bounds[i+1]−1; with one part a stage, part i is stage i.
    ``parallel.stage_layers`` overrides the computed cut."""
    model, parallel = config.model, config.parallel
    if parallel.stage_layers is not None:
        return [0, *accumulate(parallel.stage_layers)]
    ends = chunk_ends(model)
    penalties = [int(bool(ends) and boundary - 1 not in ends) for boundary in range(model.num_hidden_layers + 1)]
    if parallel.balance == "memory":
        return balance(memory_costs(config), parallel.parts, penalties, 0.0)
    costs, parts = compute_costs(config), parallel.parts
    return balance(lambda part: costs * (1 + EARLY * (1 - part / parts)), parts, penalties, TOLERANCE)


def balance(costs: Callable[[int], Costs], parts: int, penalties: Sequence[float], tolerance: float) -> list[int]:
    """Bounds of contiguous, non-empty parts with the least sum of penalties.

    Considered are the cuts whose costliest part costs at most 1 + ``tolerance`` times that of the best cut. Among cuts with equal
    penalties, the costliest part is as cheap as possible.

    Args:
        costs: by part.
        penalties: of a cut before each layer, [L + 1].
    """
    crossing = np.array([0.0, *penalties[1:]])
    worst = np.full(len(crossing), np.inf)  # by end: of the layers before it, cut into the parts so far
    worst[0] = 0.0
    start = worst
    for part in range(parts):
        worst = np.maximum(worst[:, None], costs(part)).min(0)
    limit = worst[-1] * (1 + tolerance)

    penalty, worst = start, start
    cuts = []
    for part in range(parts):
        costliest = np.maximum(worst[:, None], costs(part))
        total = np.where(costliest <= limit, (penalty + crossing)[:, None], np.inf)
        penalty = total.min(0)
        costliest[total > penalty] = np.inf
        cuts.append(costliest.argmin(0))
        worst = costliest.min(0)
    bounds = [len(crossing) - 1]
    for cut in reversed(cuts):
        bounds.append(int(cut[bounds[-1]]))
    return bounds[::-1]


def compute_costs(config: Config) -> Costs:
    """FLOPs of a stage per token. The last layer includes the output projection."""
    prices = boundary_prices(config)
    flops = [layer.both for layer in cost.layer_flops(config.model, config.data.sequence_length, prices=prices)]
    flops[-1] += cost.head_flops(config.model).both
    return range_sums(flops)


def memory_costs(config: Config) -> Callable[[int], Costs]:
    """Bytes of a part, by part; with one part a stage, of a stage: parameters with gradients and optimizer, activations and histories of the micro-batches in flight,
    and payloads received ahead. A step has global_batch_size / micro_batch_size micro-batches, as with one replica."""
    model, train = config.model, config.train
    stages, last = config.parallel.pipeline_stages, config.parallel.parts - 1
    size, settings = ITEM_BYTES[config.precision], [config.parallel.checkpointing_of(stage) for stage in range(stages)]
    by_setting = {setting: MicroBatchBytes.of(config, checkpointing=setting) for setting in settings}
    kept = by_setting[settings[0]]  # only activations depend on the setting
    history = range_sums(kept.made) + np.array(kept.crossing)[:, None]
    activations = {
        setting: range_sums(each.layers) + np.array(each.received)[:, None] for setting, each in by_setting.items()
    }
    weight_passes = range_sums(kept.weight_passes)
    layers = range(model.num_hidden_layers)
    parameters = [layer_parameters(model, layer) for layer in layers]
    fixed = range_sums([parameter_bytes(config, sizes) for sizes in parameters]) + copy_costs(config)
    landing = history if kept.lands else np.array(kept.sent)[:, None]
    # Gradients of entries, of the micro-batch that is in backward.
    if gradient_size := architecture_of(model).history_gradient_itemsize(size):
        fixed += history * gradient_size / size

    schedule = make_schedule(config, max(1, train.global_batch_size // train.micro_batch_size))
    embedding = parameter_bytes(config, {EMBEDDING_WEIGHT: model.vocab_size * model.hidden_size})
    norm = parameter_bytes(config, final_norm_parameters(model))
    head = parameter_bytes(
        config,
        {EMBEDDING_WEIGHT if model.tie_word_embeddings else HEAD_WEIGHT: model.vocab_size * model.hidden_size},
    )

    def of_part(part: int) -> Costs:
        own, once = 0, 0
        turn, stage = divmod(part, stages)
        if part == 0:
            own += kept.embedding
            once += embedding
        if part == last:
            own += kept.head
            once += norm
            if part > 0 or not model.tie_word_embeddings:
                once += head
        held = int(schedule.held_by_part(stage)[turn].max())
        here = int(histories_on_device(config, np.array(held)))
        costs: Costs = (activations[settings[stage]] + own) * held + fixed + once
        costs = costs + history * here - np.array(kept.state_in_history)[:, None] * (held - here)
        if (held_back := int(schedule.weight_passes_held(stage).max())) > 0:
            costs = costs + held_back * weight_passes
        if part > 0 and (ahead := schedule.receives_ahead(RECV_ACTIVATION)):
            costs = costs + ahead * landing
        return costs

    return of_part


def copy_costs(config: Config) -> Costs:
    """Bytes of the copies of later routers and summaries that a stage holds (`shared_weights`)."""
    model, prices = config.model, boundary_prices(config)
    costs = np.zeros((model.num_hidden_layers + 1,) * 2)
    first_crossing: dict[Entry, int] = {}
    for boundary, crossing in enumerate(model_crossings(model, prices)):
        for reader in crossing.mixtures:
            first_crossing.setdefault(reader, boundary)
    if not first_crossing:
        return costs
    policy, chunks, layers = architecture_of(model).policy, chunk_ends(model), np.arange(model.num_hidden_layers + 1)
    assert policy is not None
    sources = sources_of_readers(policy, model.num_hidden_layers)
    for reader, first in first_crossing.items():
        if reader.row > 0:  # a summary's rows cross together, and have one weight
            continue
        layer = reader.layer
        weights = summary_parameters(model, chunks[layer]) if reader.is_summary else router_parameters(model, layer)
        # A stage that sends the mixture adds to it, unless it received the mixture and makes nothing that the reader reads.
        older = np.searchsorted(sorted(entry.layer for entry in sources[reader]), layers)
        sends = (first <= layers) & (layers <= layer)
        adds = (layers[:, None] < first) | (older[:, None] < older)
        costs += parameter_bytes(config, weights) * (sends & adds)
    return costs


def range_sums(values: Sequence[float]) -> Costs:
    """Sums of values[begin:end] for all begin < end."""
    total = np.array([0.0, *accumulate(values)])
    return np.where(np.arange(len(total))[:, None] < np.arange(len(total)), total - total[:, None], np.inf)
