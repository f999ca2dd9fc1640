"""The memories over depth that studies train, and the choice of a learning rate for each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runs import Study
from sweep import sweep_losses

from lime_dist import load_config
from lime_dist.model.architecture import architecture_of
from lime_dist.model.parameters import stage_parameters


def first_last(first: int, last: int) -> str:
    return f"model.lime.history={{policy: first_last, first: {first}, last: {last}}}"


def chunked(chunk_size: int, rank: int, first: int) -> str:
    return f"model.lime.history={{policy: chunked, chunk_size: {chunk_size}, rank: {rank}, first: {first}}}"


BASE, FULL = "llama", "lime-full"
IDENTITY = "model.lime.router_init=identity"
MODELS: dict[str, list[str]] = {
    BASE: ["model.architecture=llama"],
    "hyper-static": ["model.architecture=hyper", "model.hyper.dynamic=false"],
    "hyper-dynamic": ["model.architecture=hyper"],
    "mhc": ["model.architecture=hyper", "model.hyper.connection=doubly_stochastic"],
    "mhc-lite": ["model.architecture=hyper", "model.hyper.connection=permutations"],
    "gated-residual": ["model.architecture=gated_residual"],
    "value-residual": ["model.architecture=value_residual"],
    "attention-residuals": ["model.architecture=attention_residuals"],
    "moda": ["model.lime.depth_attention=moda"],
    "moda-mlp": ["model.lime.depth_attention=moda", "model.lime.mlp_entries=true"],
    "lime-static": ["model.lime.routes=hidden"],
    "lime-dynamic": ["model.lime.routes=hidden", "model.lime.router=dynamic"],
    FULL: [],
    "lime-full-identity": [IDENTITY],
    "lime-first_last": [first_last(2, 1)],
    "lime-chunked": [chunked(8, 1, 2)],
    "lime-chunked-identity": [chunked(8, 1, 2), IDENTITY],
    "lime-dilated": ["model.lime.history={policy: dilated, stride: 4, first: 1, last: 1}"],
}
"""Overrides of the quickstart's configuration, by name. lime-full to lime-dilated mix keys and values; lime-static and lime-dynamic, hidden states."""
MOST_EXTENSIONS = 2
SPIKE = 0.1
"""A rise of the validation loss between two points of a curve, nats, that shows a learning rate to be too high."""


@dataclass(frozen=True)
class Setting:
    """A model with the learning rates of a run.

    Attributes:
        router_multiple: learning rate of the routers, over ``lr``.
        shape: overrides of the model's shape, if it is not that of the study.
    """

    model: str
    lr: float
    router_multiple: float = 1.0
    shape: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.model, f"lr{self.lr:g}", f"x{self.router_multiple:g}", *map(_short, self.shape)])

    @property
    def overrides(self) -> list[str]:
        rates = [f"optimizer.lr={self.lr}", f"optimizer.router_lr={self.lr * self.router_multiple}"]
        return [*MODELS[self.model], *self.shape, *rates]


def _short(override: str) -> str:
    """Return an override as a part of a folder's name: ``model.hidden_size=96`` as ``hidden_size96``."""
    return override.rpartition(".")[2].replace("=", "")


def has_routers(name: str) -> bool:
    """Return whether a model has parameters with the learning rate of routers."""
    model = load_config(None, MODELS[name]).model
    group = architecture_of(model).parameter_group
    return any(group(each) == "routers" for each in stage_parameters(model, range(model.num_hidden_layers)))


@dataclass
class Sweep:
    """Chooses learning rates by one run of each.

    All learning rates are tried with the first multiple for routers. While the best of a model is the lowest or the highest of those
    tried, half or double of it is tried too, twice at most. The other multiples are tried at the best learning rate. A learning rate at
    which any run of a model had a spike is not chosen, nor a higher one: a run of one seed may recover where another does not. If every
    learning rate had one, the lowest counts as the best.

    Attributes:
        study: the runs; its variants are replaced.
        models: names of :data:`MODELS`, with the shape of each if it is not that of the study.
        tried: the settings tried so far, by model and shape.
    """

    study: Study
    models: Sequence[tuple[str, tuple[str, ...]]]
    lrs: Sequence[float]
    multiples: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        self.tried = {
            (name, shape): [Setting(name, lr, self._first_multiple(name), shape) for lr in sorted(self.lrs)]
            for name, shape in self.models
        }

    def settings(self) -> list[Setting]:
        """Return all that was tried."""
        return [one for settings in self.tried.values() for one in settings]

    def run(self, jobs: int) -> list[Setting]:
        """Train what is not finished, and return the best setting of each model.

        Raises:
            LimeError: no time was left for some run.
        """
        self._train(jobs)
        while self._extend() or self._add_multiples():
            self._train(jobs)
        return [self.best(settings) for settings in self.tried.values()]

    def at_an_end(self, chosen: Setting) -> bool:
        """Return whether a lower or a higher learning rate than those tried might be better."""
        lrs = [one.lr for one in self.tried[chosen.model, chosen.shape]]
        return chosen.lr in (min(lrs), max(lrs)) and len(set(lrs)) > 1

    def _first_multiple(self, name: str) -> float:
        return self.multiples[0] if has_routers(name) else 1.0

    def _train(self, jobs: int) -> None:
        variants = {one.name: one.overrides for one in self.settings()}
        self.study = replace(self.study, variants=variants, seeds=[self.seed])
        self.study.run(jobs)

    def _extend(self) -> bool:
        """Try one more learning rate for each model whose best is at an end; return whether there was one."""
        new = []
        for settings in self.tried.values():
            best, lrs = self.best(settings), {one.lr for one in settings}
            if self.at_an_end(best) and len(lrs) < len(set(self.lrs)) + MOST_EXTENSIONS:
                new.append(replace(best, lr=best.lr * (2.0 if best.lr == max(lrs) else 0.5)))
        self._try(new)
        return bool(new)

    def _add_multiples(self) -> bool:
        """Try the other multiples for routers at the best learning rate of each model; return whether any was new."""
        new = []
        for (name, _), settings in self.tried.items():
            best = self.best(settings)
            others = [replace(best, router_multiple=one) for one in self.multiples[1:] if has_routers(name)]
            new += [one for one in others if one not in settings]
        self._try(new)
        return bool(new)

    def _try(self, settings: Sequence[Setting]) -> None:
        for one in settings:
            self.tried[one.model, one.shape].append(one)

    def best(self, settings: Sequence[Setting]) -> Setting:
        """Return the setting to choose among those of one model.

        Raises:
            LimeError: one has not been trained.
        """
        losses = sweep_losses(self.study, [one.name for one in settings], self.seed)
        lowest = min(one.lr for one in settings)
        too_high = min((one.lr for one in settings if self.has_spike(one)), default=math.inf)
        candidates = [one for one in settings if one.lr < too_high or one.lr == lowest]
        return min(candidates, key=lambda one: losses[one.name])

    def has_spike(self, setting: Setting) -> bool:
        """Return whether the validation loss of a run rose by more than :data:`SPIKE` between two points, or was not a number."""
        losses = [record["validation_loss"] for record in self.study.validations(setting.name, self.seed)]
        rises = (after - before for before, after in itertools.pairwise(losses))
        return any(map(math.isnan, losses)) or any(rise > SPIKE for rise in rises)
