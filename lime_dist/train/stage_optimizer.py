"""The optimizer of one stage: gradient accumulation in at least float32, ZeRO 1, one global gradient norm, clipping, publishing.

Which states are kept of a parameter and how one update is computed is the business of `lime_dist.train.optimizers`; how
learning rates change over steps, of `lime_dist.train.learning_rates`.

The same code serves fp32, bf16 and fp64, ZeRO 0 and 1. All parameters of a stage lie in flat buffers, in the order of
`flat_layout`: by owner (the replica that updates them; with ZeRO 0 every replica owns everything), then by group. Between them
is padding, which is zero in all buffers and stays zero in updates.

    flat_weights    in the precision of the run; the model's parameters are views into it
    flat_gradients  float32 (float64 in fp64 runs); micro-batches are accumulated here
    masters         float32 (float64); this rank's part only. The weights themselves if they have this type

A step: gradients are averaged over replicas, gradients of weights that several stages hold are summed over these stages, the
global norm is computed, each owner updates its part, and replicas exchange the new weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lime_dist.config.schema import OptimizerConfig
from lime_dist.model.architecture import Group
from lime_dist.model.optimizer_states import WEIGHT
from lime_dist.pipeline.clock import WAITING, Clock
from lime_dist.pipeline.process_groups import ProcessGroups
from lime_dist.train.flat_layout import Place, owner_ranges, place_parameters
from lime_dist.train.learning_rates.base import LearningRate
from lime_dist.train.optimizers.base import Optimizer, ParameterGroup, Span


@dataclass(frozen=True)
class NotFinite:
    """Exported names of parameters whose gradient, or whose weight, is not finite."""

    gradients: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


class StageOptimizer:
    """Updates the parameters of one stage. All ranks call each method together, unless it says otherwise.

    Args:
        parameters: by exported name; all of one type and on one device. Their memory moves into one flat buffer.
        groups: optimizer group of each parameter.
        optimizer: the update rule.
        learning_rate: the schedule of learning rates.
        config: learning rates, weight decay and the norm to clip at.
        zero_stage: 0: every replica updates everything; 1: each replica updates the parameters that it owns.
        process_groups: the ranks that share this stage, and its weights that other stages hold as well.
        clock: counts the time in which the global norm waits for other ranks.
        width_multiplier: divisor of the learning rate of matrices (`lime_dist.model.scaling`); their weight decay is multiplied by
            it, so that a step shrinks them as it does without it.

    Attributes:
        step_count: updates applied so far.
        skipped_steps: steps whose update was skipped because the gradient norm was not finite.
        gradient_norm: global norm of the newest step, before clipping.
        not_finite: what made the newest skipped update impossible, among the parameters that this rank owns.
        stage_gradient_norm: this stage's part of it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Mapping[str, Group],
        optimizer: Optimizer,
        learning_rate: LearningRate,
        config: OptimizerConfig,
        zero_stage: int,
        process_groups: ProcessGroups,
        clock: Clock | None = None,
        width_multiplier: float = 1.0,
    ) -> None:
        self._width_multiplier = width_multiplier
        self._optimizer, self._learning_rate, self._config = optimizer, learning_rate, config
        self._process_groups, self._clock = process_groups, clock
        self.parameters = dict(parameters)
        self.step_count = 0
        self.skipped_steps = 0
        self.gradient_norm = 0.0
        self.not_finite = NotFinite()
        self.stage_gradient_norm = 0.0
        self._replicas = dist.get_world_size(process_groups.replicas)
        self.is_sharded = zero_stage == 1 and self._replicas > 1
        self._owner = dist.get_rank(process_groups.replicas) if self.is_sharded else 0

        owners = self._replicas if self.is_sharded else 1
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        states = {name: optimizer.states(name, groups[name]) for name in shapes}
        first = next(iter(self.parameters.values()))
        self._shared = [name for name in process_groups.shared if name in shapes]
        of_several_stages = process_groups.tied.keys() | self._shared
        self._places = place_parameters(shapes, groups, states, owners, of_several_stages, first.itemsize)
        self._ranges = owner_ranges(self._places, owners)

        accumulation_dtype = torch.promote_types(first.dtype, torch.float32)
        size = self._ranges[-1][1]
        self.flat_weights = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.flat_gradients = torch.zeros(size, dtype=accumulation_dtype, device=first.device)
        self._move_parameters()
        begin, end = self._ranges[self._owner]
        own = self.flat_weights[begin:end]
        self.masters = own if own.dtype == accumulation_dtype else own.to(accumulation_dtype)
        self.parameter_groups = self._make_parameter_groups()

    # -- memory -------------------------------------------------------------------------------------------------------

    def _view(self, flat: Tensor, name: str) -> Tensor:
        place = self._places[name]
        return flat[place.begin : place.end].view(place.shape)

    def _move_parameters(self) -> None:
        """Make parameters views of flat_weights, and backward add to flat_gradients: directly if the type allows, else by a hook."""
        self._gradients: dict[int, Tensor] = {}  # by id of the parameter, which lives as long as this object
        for name, parameter in self.parameters.items():
            weight, gradient = self._view(self.flat_weights, name), self._view(self.flat_gradients, name)
            self._gradients[id(parameter)] = gradient
            weight.copy_(parameter.data)
            parameter.data = weight
            if weight.dtype == gradient.dtype:
                parameter.grad = gradient
            else:
                parameter.register_post_accumulate_grad_hook(lambda p, gradient=gradient: _move_gradient(p, gradient))

    def _make_parameter_groups(self) -> list[ParameterGroup]:
        """The parameters that this rank updates: one `ParameterGroup` per optimizer group and set of states, in their order."""
        kinds: dict[tuple[Group, tuple[str, ...]], dict[str, Place]] = {}
        for name, place in self._places.items():
            if place.owner == self._owner:
                kinds.setdefault((place.group, place.states), {})[name] = place
        offset, _ = self._ranges[self._owner]
        groups = []
        for (group, states), places in kinds.items():
            begin, end = min(place.begin for place in places.values()), max(place.stop for place in places.values())
            weight = self.masters[begin - offset : end - offset]
            groups.append(
                ParameterGroup(
                    group=group,
                    spans={
                        name: Span(place.begin - begin, place.end - begin, place.shape)
                        for name, place in places.items()
                    },
                    weight=weight,
                    gradient=self.flat_gradients[begin:end],
                    states={state: torch.zeros_like(weight) for state in states},
                    weight_decay=self._config.weight_decay * self._width_multiplier if group == "matrices" else 0.0,
                )
            )
        return groups

    # -- one step -----------------------------------------------------------------------------------------------------

    def learning_rates(self) -> tuple[float, float]:
        """(lr, router_lr) of the next update. Any rank may call it alone."""
        factor = self._learning_rate.factor(self.step_count)
        return self._config.lr * factor, self._config.router_lr * factor

    def gradient(self, name: str) -> Tensor:
        """A view of a parameter's accumulated gradient, in the parameter's shape. Any rank may call it alone."""
        return self._view(self.flat_gradients, name)

    def gradient_of(self, weight: Tensor) -> Tensor:
        """`gradient` by parameter. What is added to it counts as a part of the gradient."""
        return self._gradients[id(weight)]

    def reduce_gradients(self, loss: Tensor | None = None) -> None:
        """Average gradients over replicas, then sum gradients of tied and shared weights over the stages that hold them.

        The order matters. A tied weight lies at different places of the stages' flat buffers, so the sum over replicas may be
        taken in a different order on each stage. A sum over two stages is the same on both, and copies of a tied weight must
        not drift apart.

        Args:
            loss: scalar, on the last stage. If it is not finite, neither is the gradient norm, so that all ranks skip the update.
        """
        if loss is not None:
            self.flat_gradients[:1] += torch.where(loss.isfinite(), 0.0, math.nan).to(self.flat_gradients)
        self._average_over_replicas()
        for name in sorted(self._process_groups.tied):
            if self._places[name].owner == self._owner:
                dist.all_reduce(self.gradient(name), group=self._process_groups.tied[name])
        self._sum_shared_gradients()

    def _sum_shared_gradients(self) -> None:
        """Sum the gradients of routers and summaries over the stages that hold a copy, in one message. All stages of every replica
        that updates them take part, and all receive the same sums."""
        sizes = self._process_groups.shared
        if not sizes or self._owner != 0:
            return
        packed = self.flat_gradients.new_zeros(sum(sizes.values()))
        parts = dict(zip(sizes, packed.split(list(sizes.values())), strict=True))
        for name in self._shared:
            parts[name].copy_(self.gradient(name).reshape(-1))
        with self._clock.measuring(WAITING) if self._clock is not None else nullcontext():
            dist.all_reduce(packed, group=self._process_groups.pipeline)
        for name in self._shared:
            self.gradient(name).copy_(parts[name].view(self._places[name].shape))

    def _average_over_replicas(self) -> None:
        """With ZeRO 1 each owner receives the gradients of its own parameters only."""
        if self._replicas == 1:
            return
        self.flat_gradients /= self._replicas
        if not self.is_sharded:
            dist.all_reduce(self.flat_gradients, group=self._process_groups.replicas)
            return
        for owner, (begin, end) in enumerate(self._ranges):
            if end > begin:
                target = dist.get_global_rank(self._process_groups.replicas, owner)
                dist.reduce(self.flat_gradients[begin:end], target, group=self._process_groups.replicas)

    def norms(self) -> Tensor:
        """2-norms of the gradient of the whole model and of this stage, float64 [2] on the device. The first is the same number
        on every rank; a weight of several stages counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self.flat_gradients.device)
        for name in self.owned_names():
            total += torch.linalg.vector_norm(self.gradient(name), dtype=torch.float64) ** 2
        with self._clock.measuring(WAITING) if self._clock is not None else nullcontext():
            if self.is_sharded:
                dist.all_reduce(total, group=self._process_groups.replicas)
            of_stage = total.clone()
            dist.all_reduce(total, group=self._process_groups.pipeline)
            return torch.stack((total, of_stage)).pow(0.5)  # `sqrt` of MKL is not always rounded correctly

    @torch.no_grad()
    def warm_up(self, loss: Tensor | None = None) -> None:
        """Take a step that changes nothing but the gradients, which it clears: it runs the kernels of a step, and connects the
        ranks. The update is made on one parameter of each shape, whose weights, gradients and states are zero.

        Args:
            loss: any finite scalar, on the last stage.
        """
        kept = self.parameter_groups
        self.flat_gradients.zero_()
        self.reduce_gradients(loss)
        self.parameter_groups = [group.of_zeros() for group in self.parameter_groups]
        self.step()
        self.parameter_groups = kept

    @torch.no_grad()
    def step(self) -> Tensor:
        """Clip by the global norm, update, and clear the gradients. If the norm is not finite, nothing changes.

        The host does not wait: the device decides what to clip and whether to update. Call `settle` before the next step.

        Returns:
            `norms`.
        """
        norms = self.norms()
        finite = norms[0].isfinite()
        skip = finite.logical_not().to(torch.float32)
        scale = torch.where(finite, (self._config.max_grad_norm / (norms[0] + 1e-6)).clamp(max=1), 1.0)
        begin, end = self._ranges[self._owner]
        self.flat_gradients[begin:end] *= scale
        lr, router_lr = self.learning_rates()
        for group in self.parameter_groups:
            group.lr = {"routers": router_lr, "matrices": lr / self._width_multiplier}.get(group.group, lr)
        self._optimizer.update(self.parameter_groups, self.step_count + 1, skip)
        self._publish()
        # 0, unless `settle` has to find what is not finite. The sum makes 0 of a negative 0.
        self.flat_gradients[begin:end].mul_(skip).add_(0.0)
        self.flat_gradients[:begin].zero_()
        self.flat_gradients[end:].zero_()
        return norms

    @torch.no_grad()
    def settle(self, norms: Sequence[float]) -> bool:
        """Take note of a step whose ``norms`` have been read. Any rank may call it alone.

        Returns:
            Whether the step updated the parameters.
        """
        self.gradient_norm, self.stage_gradient_norm = norms
        if math.isfinite(self.gradient_norm):
            self.step_count += 1
            return True
        self.skipped_steps += 1
        names = self.owned_names()
        self.not_finite = NotFinite(
            gradients=tuple(name for name in names if not self.gradient(name).isfinite().all()),
            weights=tuple(name for name in names if not self._view(self.flat_weights, name).isfinite().all()),
        )
        self.flat_gradients.zero_()
        return False

    def _publish(self) -> None:
        """Copy masters to the weights of every replica."""
        begin, end = self._ranges[self._owner]
        if self.masters.dtype != self.flat_weights.dtype:
            self.flat_weights[begin:end].copy_(self.masters)
        if self.is_sharded:
            for owner, (first, last) in enumerate(self._ranges):
                if last > first:
                    source = dist.get_global_rank(self._process_groups.replicas, owner)
                    dist.broadcast(self.flat_weights[first:last], source, group=self._process_groups.replicas)

    # -- state by parameter, which does not depend on the layout; any rank may call these alone -----------------------

    def owned_names(self) -> list[str]:
        """Parameters whose state this rank holds and saves. A weight of several stages belongs to the one that counts it."""
        return [name for name in self.local_names() if name not in self._process_groups.tied_copies]

    def local_names(self) -> list[str]:
        """Parameters that this rank updates: those that it owns, and its copies of tied and shared weights."""
        return [name for name, place in self._places.items() if place.owner == self._owner]

    def state(self, name: str) -> dict[str, Tensor]:
        """Writable views of a parameter's master weight (``weight``) and of its optimizer states, in at least float32.

        Raises:
            KeyError: another replica owns the parameter.
        """
        for group in self.parameter_groups:
            if name in group.spans:
                return {key: group.view(flat, name) for key, flat in ((WEIGHT, group.weight), *group.states.items())}
        raise KeyError(f"{name} is owned by replica {self._places[name].owner}")

    def restore_finished(self, step_count: int) -> None:
        """Complete a restore, after every `state` has been written: set the step and publish the weights.

        With ZeRO 1 all replicas call it together.
        """
        self.step_count = step_count
        with torch.no_grad():
            self._publish()


def _move_gradient(parameter: Tensor, view: Tensor) -> None:
    assert parameter.grad is not None
    view.add_(parameter.grad)
    parameter.grad = None
