"""Worker cases for the warm-up: what it launches, what a step launches, and what it leaves behind."""

from __future__ import annotations

import re
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from support.transfers import build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.equality import rank_batches

NO_KERNELS = re.compile(r"aten\.((new_)?empty|promote_types)|c10d\.(send|recv)")
INSTRUCTIONS_OF_PASSES = ("LoadMicroBatch", "ForwardPass", "Backward", "Send", "Recv")

Launch = tuple[str, tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]]
"""An operation with the type, the shape and the strides of each tensor that it takes: what decides about its kernels."""


class Launches(TorchDispatchMode):
    """The operations that run, by what the engine does meanwhile. Views, allocations and types launch nothing, and transfers are
    not the warm-up's: both ends connect when an engine is made."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.by_work: dict[str, set[Launch]] = defaultdict(set)
        self._work = ""
        watching = type(engine).watching

        def noted(work: str, ranks: Any = None) -> Any:
            self._work = work
            return watching(engine, work, ranks)

        engine.watching = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not NO_KERNELS.match(str(func)):
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.by_work[self._work].add(
                (str(func), tuple((str(x.dtype), tuple(x.shape), x.stride()) for x in tensors))
            )
        return func(*args, **(kwargs or {}))

    def take(self) -> tuple[set[Launch], set[Launch]]:
        """What ran since the last call: from the first to the last pass of a step, and the rest."""
        passes, rest = set[Launch](), set[Launch]()
        for work, launches in self.by_work.items():
            (passes if work.startswith(INSTRUCTIONS_OF_PASSES) else rest).update(launches)
        self.by_work.clear()
        return passes, rest


def state_of(engine: Any, optimizer: Any) -> dict[str, Any]:
    """Every number and every tensor that a training has, the tensors as bytes."""
    state: dict[str, Any] = {"rng": torch.get_rng_state()}
    for owner in (engine, optimizer):
        state |= {f"{type(owner).__name__}.{name}": value for name, value in vars(owner).items()}
    for name, parameter in optimizer.parameters.items():
        state |= {name: parameter.data, f"{name} gradient": parameter.grad, f"{name} place": parameter.data_ptr()}
    for number, group in enumerate(optimizer.parameter_groups):
        state |= {f"group {number} {name}": flat for name, flat in (*group.states.items(), ("weight", group.weight))}
    kept = {
        name: value
        for name, value in state.items()
        if value is None or isinstance(value, int | float | str | Tensor | list)
    }
    return {name: _content(value) for name, value in kept.items()}


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [_content(each) for each in value] if isinstance(value, list) else value


def step(config: Any, engine: Any, number: int, launches: Launches | None = None) -> list[float]:
    """Losses of a step, and of an evaluation after it."""
    replica, width = engine.grid.get_data_parallel_rank(), engine.dp_world_size
    size = config.train.micro_batch_size
    training, evaluation = (list(rank_batches(config, each, replica, width, size)) for each in (number, 100))
    with launches or nullcontext():
        loss = engine.train_step(iter(training))
        return [loss, engine.evaluate(iter(evaluation), len(evaluation))]


def warm_up(values: dict[str, Any]) -> dict[str, Any]:
    """Return what two steps and evaluations launch that a warm-up had not launched, what a warm-up in between changes, and whether
    the losses are those of a run without."""
    config, engine, optimizer = build(values)
    launches = Launches(engine)
    before = state_of(engine, optimizer)
    with launches:
        engine.warm_up()
    warm = set.union(*launches.take())
    changed = _difference(before, state_of(engine, optimizer))
    losses = step(config, engine, 0, launches)
    passes, rest = launches.take()
    before = state_of(engine, optimizer)
    engine.warm_up()
    changed += _difference(before, state_of(engine, optimizer))
    losses += step(config, engine, 1)
    after = state_of(engine, optimizer)
    config, engine, optimizer = build(values)
    cold = step(config, engine, 0) + step(config, engine, 1)
    cold_state = state_of(engine, optimizer)
    return {
        "changed": changed,
        "passes": len(passes),
        "new in passes": sorted(passes - warm),
        "new in the rest": sorted({launch[0] for launch in rest - warm}),
        "losses": losses == cold,
        "parameters": all(after[name] == cold_state[name] for name in optimizer.parameters),
    }


def _difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def compilations(values: dict[str, Any]) -> tuple[int, int]:
    """Return how many graphs a warm-up compiles, and how many a step and an evaluation after it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    config, engine, _ = build(values)
    counters.clear()
    engine.warm_up()
    warm = counters["stats"]["unique_graphs"]
    step(config, engine, 0)
    return warm, counters["stats"]["unique_graphs"] - warm
