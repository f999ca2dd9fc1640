"""AdamW over one stage: float32 masters and gradient accumulation, ZeRO-1 sharding, one global gradient norm, one clip.

The same code serves fp32, bf16 and fp64, ZeRO 0 and 1. All parameters of a stage live in one flat buffer, ordered by
owner (the data-parallel rank that updates them; with ZeRO 0 every rank owns all), then by optimizer group:

    flat_weights   in the precision of the run; parameters are views into it
    flat_gradients float32 (float64 in fp64 runs); micro-batches add up here
    masters        float32; the owner's segment only, the weights themselves where their precision suffices

A step: gradients are averaged over the replicas, tied ones summed over their stages, the global norm is computed, the owner updates its segment, and replicas exchange segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lime_dist.config.schema import Config, OptimizerConfig
from lime_dist.model.init import GROUPS, Group, parameter_group
from lime_dist.pipeline.clock import WAITING, Clock
from lime_dist.pipeline.engine import LimeEngine, ProcessGroups
from lime_dist.pipeline.module import LimePipelineModule
from lime_dist.pipeline.overlap import OverlapEngine
from lime_dist.pipeline.owners import assign_owners


def schedule_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning-rate factor of the update after ``step`` earlier ones: linear warm-up, then cosine to min_lr / lr."""
    floor = config.min_lr / config.lr
    if step < config.warmup_steps:
        return max(floor, (step + 1) / config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class _Place:
    owner: int
    group: Group
    begin: int
    end: int


class StageOptimizer:
    """AdamW for the parameters of one stage.

    Args:
        parameters: by exported name; all of one type and device. Their memory moves into one flat buffer.
        zero_stage: 0: every replica updates everything; 1: each replica updates the segment that it owns.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        total_steps: int,
        zero_stage: int,
        groups: ProcessGroups,
    ) -> None:
        self.config, self.total_steps, self.groups = config, total_steps, groups
        self.parameters = dict(parameters)
        self.step_count = 0
        self.skipped_steps = 0
        self.gradient_norm = 0.0
        self.stage_gradient_norm = torch.zeros(())  # of this stage's part, before clipping; on the device
        self.clock: Clock | None = None
        self.width = dist.get_world_size(groups.replicas)
        self.is_sharded = zero_stage == 1 and self.width > 1
        self.rank = dist.get_rank(groups.replicas) if self.is_sharded else 0

        self._places = _assign(self.parameters, self.width if self.is_sharded else 1, frozenset(groups.tied))
        first = next(iter(self.parameters.values()))
        exact = torch.promote_types(first.dtype, torch.float32)
        size = sum(parameter.numel() for parameter in self.parameters.values())
        self.flat_weights = torch.empty(size, dtype=first.dtype, device=first.device)
        self.flat_gradients = torch.zeros(size, dtype=exact, device=first.device)
        for name, parameter in self.parameters.items():
            view = self._view(self.flat_weights, name)
            view.copy_(parameter.data)
            parameter.data = view
        self._segments = _segments(self._places, self.width if self.is_sharded else 1)
        begin, end = self._segments[self.rank]
        own = self.flat_weights[begin:end]
        self.masters = own if own.dtype == exact else own.to(exact)
        self._collect_gradients(exact)
        self.adam: torch.optim.AdamW | None = None  # a replica may own nothing: more replicas than tensors
        if adam_groups := self._adam_groups(begin):
            self.adam = torch.optim.AdamW(adam_groups, betas=config.betas, eps=config.eps, fused=True, lr=config.lr)
        for group in self._own_groups():
            for weight in group["params"]:
                assert self.adam is not None
                self.adam.state[weight] = {
                    "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }

    # -- memory -------------------------------------------------------------------------------------------------------

    def _view(self, flat: Tensor, name: str) -> Tensor:
        place = self._places[name]
        return flat[place.begin : place.end].view(self.parameters[name].shape)

    def _collect_gradients(self, exact: torch.dtype) -> None:
        """Make backward add into flat_gradients: directly where the type allows, else through a hook."""
        for name, parameter in self.parameters.items():
            view = self._view(self.flat_gradients, name)
            if parameter.dtype == exact:
                parameter.grad = view
            else:
                parameter.register_post_accumulate_grad_hook(lambda p, view=view: _move_gradient(p, view))

    def _adam_groups(self, begin: int) -> list[dict[str, object]]:
        """One AdamW group per optimizer group that has elements in this rank's segment; each is one flat tensor."""
        found: list[dict[str, object]] = []
        for group in GROUPS:
            places = [place for place in self._places.values() if place.owner == self.rank and place.group == group]
            if not places:
                continue
            start, stop = min(place.begin for place in places), max(place.end for place in places)
            weight = self.masters[start - begin : stop - begin]
            weight.grad = self.flat_gradients[start:stop]
            decay = self.config.weight_decay if group == "matrices" else 0.0
            found.append({"params": [weight], "weight_decay": decay, "name": group, "start": start})
        return found

    def _own_groups(self) -> list[dict[str, Any]]:
        return self.adam.param_groups if self.adam is not None else []

    # -- one step -----------------------------------------------------------------------------------------------------

    def learning_rates(self) -> tuple[float, float]:
        """(lr, router_lr) of the next update."""
        factor = schedule_factor(self.config, self.step_count, self.total_steps)
        return self.config.lr * factor, self.config.router_lr * factor

    def reduce_gradients(self, loss: Tensor | None = None) -> None:
        """Average over replicas, then add up over the stages that share a tied weight.

        A ``loss`` that is not finite (scalar, on the last stage) makes a gradient that is not, so that all ranks skip the step.

        In this order: a tied weight lies elsewhere in each stage's flat buffer, so that replicas may be added in another
        order there, while a sum of two is the same on both; its copies must not drift apart.
        """
        if loss is not None:
            self.flat_gradients[:1] += torch.where(loss.isfinite(), 0.0, math.nan).to(self.flat_gradients)
        self._average_over_replicas()
        for name in sorted(self.groups.tied):
            if self._places[name].owner == self.rank:
                dist.all_reduce(self._view(self.flat_gradients, name), group=self.groups.tied[name])

    def _average_over_replicas(self) -> None:
        """With ZeRO 1 each owner receives its own segment only."""
        if self.width == 1:
            return
        self.flat_gradients /= self.width
        if not self.is_sharded:
            dist.all_reduce(self.flat_gradients, group=self.groups.replicas)
            return
        for owner, (begin, end) in enumerate(self._segments):
            if end > begin:
                target = dist.get_global_rank(self.groups.replicas, owner)
                dist.reduce(self.flat_gradients[begin:end], target, group=self.groups.replicas)

    def global_norm(self) -> float:
        """The 2-norm of the whole model's gradient, the same number on every rank; a tied weight counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self.flat_gradients.device)
        for name, place in self._places.items():
            if place.owner == self.rank and name not in self.groups.tied_copies:
                total += torch.linalg.vector_norm(self._view(self.flat_gradients, name), dtype=torch.float64) ** 2
        with self.clock.measuring(WAITING) if self.clock is not None else nullcontext():
            if self.is_sharded:
                dist.all_reduce(total, group=self.groups.replicas)
            self.stage_gradient_norm = total.sqrt()
            dist.all_reduce(total, group=self.groups.pipeline)
            return math.sqrt(total.item())

    @torch.no_grad()
    def step(self) -> bool:
        """Clip by the global norm and update; False (and no change) if the norm is not finite. Clears the gradients."""
        self.gradient_norm = self.global_norm()
        applied = math.isfinite(self.gradient_norm)
        if applied:
            scale = self.config.max_grad_norm / (self.gradient_norm + 1e-6)
            begin, end = self._segments[self.rank]
            if scale < 1:
                self.flat_gradients[begin:end] *= scale
            lr, router_lr = self.learning_rates()
            for group in self._own_groups():
                group["lr"] = router_lr if group["name"] == "routers" else lr
            if self.adam is not None:
                self.adam.step()
            self._publish()
            self.step_count += 1
        else:
            self.skipped_steps += 1
        self.flat_gradients.zero_()
        return applied

    def _publish(self) -> None:
        """Masters -> weights of every replica."""
        begin, end = self._segments[self.rank]
        if self.masters.dtype != self.flat_weights.dtype:
            self.flat_weights[begin:end].copy_(self.masters)
        if self.is_sharded:
            for owner, (first, last) in enumerate(self._segments):
                if last > first:
                    source = dist.get_global_rank(self.groups.replicas, owner)
                    dist.broadcast(self.flat_weights[first:last], source, group=self.groups.replicas)

    # -- layout-free state --------------------------------------------------------------------------------------------

    def owned_names(self) -> list[str]:
        """Exported names whose state this rank holds; a tied weight belongs to the stage that counts it."""
        return [
            name
            for name, place in self._places.items()
            if place.owner == self.rank and name not in self.groups.tied_copies
        ]

    def state(self, name: str) -> dict[str, Tensor]:
        """Views of one parameter's float32 weight and moments, by {weight, exp_avg, exp_avg_sq}; writable."""
        place, shape = self._places[name], self.parameters[name].shape
        if place.owner != self.rank:
            raise KeyError(f"{name} is owned by replica {place.owner}")
        for group in self._own_groups():
            if group["name"] == place.group:
                assert self.adam is not None
                (weight,) = group["params"]
                begin, end = place.begin - group["start"], place.end - group["start"]
                moments = self.adam.state[weight]
                return {
                    "weight": weight[begin:end].view(shape),
                    "exp_avg": moments["exp_avg"][begin:end].view(shape),
                    "exp_avg_sq": moments["exp_avg_sq"][begin:end].view(shape),
                }
        raise KeyError(name)

    def local_names(self) -> list[str]:
        """Exported names that this rank updates: its owned ones and its copies of tied weights."""
        return [name for name, place in self._places.items() if place.owner == self.rank]

    def restore_finished(self, step_count: int) -> None:
        """Call after writing into every `state`: sets the step and publishes the weights."""
        self.step_count = step_count
        for group in self._own_groups():
            assert self.adam is not None
            for weight in group["params"]:
                self.adam.state[weight]["step"].fill_(float(step_count))
        with torch.no_grad():
            self._publish()


def build_engine(config: Config, verbose: bool = False) -> tuple[LimeEngine, StageOptimizer]:
    """This process's stage, the engine that runs it and the optimizer that updates it; called on every rank."""
    module = LimePipelineModule(config, verbose)
    engine = (LimeEngine if config.pipeline.engine == "stock" else OverlapEngine)(module, config)
    optimizer = StageOptimizer(
        module.exported_parameters,
        config.optimizer,
        config.train.steps,
        config.parallel.zero_stage,
        engine.process_groups(),
    )
    engine.optimizer, optimizer.clock = optimizer, engine.clock
    return engine, optimizer


def _move_gradient(parameter: Tensor, view: Tensor) -> None:
    assert parameter.grad is not None
    view.add_(parameter.grad)
    parameter.grad = None


def _assign(parameters: Mapping[str, nn.Parameter], owners: int, tied: frozenset[str]) -> dict[str, _Place]:
    """Where each parameter lies: offsets by (owner, group, given order)."""
    owner_of = assign_owners({name: parameter.numel() for name, parameter in parameters.items()}, owners, tied)
    group_of = {name: parameter_group(name) for name in parameters}
    places: dict[str, _Place] = {}
    offset = 0
    for name in sorted(parameters, key=lambda name: (owner_of[name], GROUPS.index(group_of[name]))):
        end = offset + parameters[name].numel()
        places[name] = _Place(owner_of[name], group_of[name], offset, end)
        offset = end
    assert set(places) == set(parameters) and offset == sum(p.numel() for p in parameters.values())
    return places


def _segments(places: Mapping[str, _Place], owners: int) -> list[tuple[int, int]]:
    """[begin, end) of every owner in the flat buffer; an owner without parameters has an empty segment."""
    segments = []
    offset = 0
    for owner in range(owners):
        end = max((place.end for place in places.values() if place.owner == owner), default=offset)
        segments.append((offset, end))
        offset = end
    return segments
