"""The optimizer of one stage: gradient accumulation in at least float32, ZeRO 1, one global gradient norm, clipping, publishing.

Which states are kept of a parameter and how one update is computed is the business of `lime_dist.train.optimizers`; how
learning rates change over steps, of `lime_dist.train.learning_rates`.

The same code serves fp32, bf16 and fp64, ZeRO 0 and 1. All parameters of a stage lie in flat buffers, in the order of
`lime_dist.pipeline.flat_layout`, which divides them among the replicas (with ZeRO 0 every replica updates everything). Between them
is padding, which is zero in all buffers and stays zero in updates.

    flat_weights    in the precision of the run; the model's parameters are views into it
    flat_gradients  float32 (float64 in fp64 runs); micro-batches are accumulated here
    masters         float32 (float64); of what this rank updates. The weights themselves if they have this type

A step: gradients are averaged over replicas, gradients of weights that several stages hold are summed over these stages, the
global norm is computed, each replica updates its part, and replicas gather the new weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lime_dist.config.schema import OptimizerConfig
from lime_dist.model.architecture import Group
from lime_dist.model.optimizer_states import WEIGHT, StatePart
from lime_dist.pipeline.clock import WAITING, Clock
from lime_dist.pipeline.flat_layout import FlatLayout, lay_out, overlap
from lime_dist.pipeline.process_groups import ProcessGroups
from lime_dist.train.early_sums import EarlySums
from lime_dist.train.gradient_hooks import accumulate_in, call_when_accumulated
from lime_dist.train.learning_rates.base import LearningRate
from lime_dist.train.optimizers.base import Optimizer, ParameterGroup, Span
from lime_dist.train.replicas import Replicas


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
        zero_stage: 0: every replica updates everything; 1: replicas divide the updates.
        process_groups: the ranks that share this stage, and its weights that other stages hold as well.
        clock: counts the time in which the global norm waits for other ranks.
        width_multiplier: divisor of the learning rate of matrices (`lime_dist.model.scaling`); their weight decay is multiplied by
            it, so that a step shrinks them as it does without it.

    Attributes:
        step_count: updates applied so far.
        skipped_steps: steps whose update was skipped because the gradient norm was not finite.
        gradient_norm: global norm of the newest step, before clipping.
        not_finite: what made the newest skipped update impossible, among what this rank updates.
        replicas: the exchange with the other ranks of the stage.
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
        replicas = dist.get_world_size(process_groups.replicas)
        self.is_sharded = zero_stage == 1 and replicas > 1
        self._shared = [name for name in process_groups.shared if name in self.parameters]
        first = next(iter(self.parameters.values()))
        self._layout = self._lay_out(groups, replicas if self.is_sharded else 1, first.itemsize)
        self.replicas = Replicas(process_groups.replicas, self._layout)
        keys = {name: id(parameter) for name, parameter in self.parameters.items()}
        self._sums = EarlySums(self._layout, keys, self._start_average)
        self._own = self._layout.owned(self.replicas.own)

        accumulation_dtype = torch.promote_types(first.dtype, torch.float32)
        size = self._layout.size
        self.flat_weights = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.flat_gradients = torch.zeros(size, dtype=accumulation_dtype, device=first.device)
        self._move_parameters()
        self.masters = [self.flat_weights[own.start : own.stop] for own in self._own]
        if first.dtype != accumulation_dtype:
            copy = torch.cat(self.masters).to(accumulation_dtype)
            self.masters = list(copy.split([len(own) for own in self._own]))
        self._own_parts: dict[str, list[range]] = {}  # by exported name, elements of the flat buffers
        self._states: dict[str, list[StatePart]] = {}
        self.parameter_groups = self._make_parameter_groups()

    def _lay_out(self, groups: Mapping[str, Group], owners: int, itemsize: int) -> FlatLayout:
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        states = {name: self._optimizer.states(name, groups[name]) for name in shapes}
        whole = {name for name in shapes if not self._optimizer.is_elementwise(name, groups[name])}
        tied = frozenset(self._process_groups.tied)
        return lay_out(shapes, groups, states, itemsize, owners, tied, frozenset(self._shared), whole)

    # -- memory -------------------------------------------------------------------------------------------------------

    def _view(self, flat: Tensor, name: str) -> Tensor:
        place = self._layout.places[name]
        return flat[place.begin : place.end].view(place.shape)

    def _move_parameters(self) -> None:
        """Make parameters views of flat_weights, and backward add to flat_gradients."""
        self._gradients: dict[int, Tensor] = {}  # by id of the parameter, which lives as long as this object
        for name, parameter in self.parameters.items():
            weight, gradient = self._view(self.flat_weights, name), self._view(self.flat_gradients, name)
            self._gradients[id(parameter)] = gradient
            weight.copy_(parameter.data)
            parameter.data = weight
            accumulate_in(gradient, parameter)
            if self.replicas.count > 1:
                call_when_accumulated(self.gradient_is_final, parameter)

    def _make_parameter_groups(self) -> list[ParameterGroup]:
        """What this rank updates: one `ParameterGroup` for each run of the layout."""
        groups = []
        for number, run in self._layout.runs(self.replicas.own):
            begin, stop, offset = run.elements.start, run.elements.stop, self._own[number].start
            weight = self.masters[number][begin - offset : stop - offset]
            spans = {
                name: Span(part.start - begin, part.stop - begin, self._shape_of(name, part))
                for name, part in run.parts.items()
            }
            decay = self._config.weight_decay * self._width_multiplier if run.group == "matrices" else 0.0
            states = {state: torch.zeros_like(weight) for state in run.states}
            groups.append(ParameterGroup(run.group, spans, weight, self.flat_gradients[begin:stop], states, decay))
            for name, part in run.parts.items():
                first, inner = self._layout.places[name].begin, slice(part.start - begin, part.stop - begin)
                values = {key: flat[inner] for key, flat in ((WEIGHT, weight), *states.items())}
                elements = range(part.start - first, part.stop - first)
                self._own_parts.setdefault(name, []).append(part)
                self._states.setdefault(name, []).append(StatePart(elements, values))
        return groups

    def _shape_of(self, name: str, part: range) -> tuple[int, ...]:
        """The parameter's shape if ``part`` is all of it, else that of a flat part."""
        shape = self._layout.places[name].shape
        return shape if len(part) == prod(shape) else (len(part),)

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

    def begin_last_pass(self) -> None:
        """Say that the last backward pass of a step begins. Sums over replicas start while it runs, piece by piece."""
        self._sums.open()

    @torch.no_grad()
    def gradient_is_final(self, weight: Tensor) -> None:
        """Say that nothing more is added to the gradient of a parameter in this step. Backward passes say it of the parameters whose
        gradients they compute; without effect before `begin_last_pass`."""
        self._sums.finish(id(weight))

    def reduce_gradients(self, loss: Tensor | None = None) -> None:
        """Average gradients over replicas, then sum gradients of tied and shared weights over the stages that hold them.

        The order matters. A tied weight lies at different places of the stages' flat buffers, so the sum over replicas may be
        taken in a different order on each stage. A sum over two stages is the same on both, and copies of a tied weight must
        not drift apart.

        Args:
            loss: scalar, on the last stage. If it is not finite, neither is the gradient norm, so that all ranks skip the update.
                Element 0 carries it, in the piece that is summed last. If that is a copy of a tied weight, which does not count in the
                norm, the sum over stages carries it to the one that does.
        """
        if loss is not None:
            self.flat_gradients[:1] += torch.where(loss.isfinite(), 0.0, math.nan).to(self.flat_gradients)
        self._sums.start_rest()
        self.replicas.finish_sums()
        for name in sorted(self._process_groups.tied):
            for part in self._own_gradients(name):  # copies are cut alike: each replica sums its part
                dist.all_reduce(part, group=self._process_groups.tied[name])
        self._sum_shared_gradients()

    def _sum_shared_gradients(self) -> None:
        """Sum the gradients of routers and summaries over the stages that hold a copy, in one message. All stages of every replica
        that updates them take part, and all receive the same sums."""
        sizes = self._process_groups.shared
        if not sizes or self.replicas.own != 0:
            return
        packed = self.flat_gradients.new_zeros(sum(sizes.values()))
        parts = dict(zip(sizes, packed.split(list(sizes.values())), strict=True))
        for name in self._shared:
            parts[name].copy_(self.gradient(name).reshape(-1))
        with self._clock.measuring(WAITING) if self._clock is not None else nullcontext():
            dist.all_reduce(packed, group=self._process_groups.pipeline)
        for name in self._shared:
            self.gradient(name).copy_(parts[name].view(self._layout.places[name].shape))

    def _start_average(self, piece: range) -> None:
        """Start to average a piece over replicas. With ZeRO 1 each replica receives the averages of its slice only."""
        if self.replicas.count > 1:
            self.flat_gradients[piece.start : piece.stop] /= self.replicas.count
            self.replicas.start_sum(self.flat_gradients, piece)

    def _own_gradients(self, name: str) -> list[Tensor]:
        """The parts of a parameter's gradient that this rank updates, flat."""
        return [self.flat_gradients[part.start : part.stop] for part in self._own_parts.get(name, ())]

    def norms(self) -> Tensor:
        """2-norms of the gradient of the whole model and of this stage, float64 [2] on the device. The first is the same number
        on every rank; a weight of several stages counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self.flat_gradients.device)
        for name in self.owned_names():
            for part in self._own_gradients(name):
                total += torch.linalg.vector_norm(part, dtype=torch.float64) ** 2
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
        for own in self._own:
            self.flat_gradients[own.start : own.stop] *= scale
        lr, router_lr = self.learning_rates()
        for group in self.parameter_groups:
            group.lr = {"routers": router_lr, "matrices": lr / self._width_multiplier}.get(group.group, lr)
        self._optimizer.update(self.parameter_groups, self.step_count + 1, skip)
        self._publish()
        begin = 0
        for own in self._own:
            # 0, unless `settle` has to find what is not finite. The sum makes 0 of a negative 0.
            self.flat_gradients[own.start : own.stop].mul_(skip).add_(0.0)
            self.flat_gradients[begin : own.start].zero_()
            begin = own.stop
        self.flat_gradients[begin:].zero_()
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
            gradients=tuple(name for name in names if not all(map(_is_finite, self._own_gradients(name)))),
            weights=tuple(name for name in names if not _is_finite(self._view(self.flat_weights, name))),
        )
        self.flat_gradients.zero_()
        return False

    def _publish(self) -> None:
        """Copy masters to the weights of every replica."""
        for own, master in zip(self._own, self.masters, strict=True):
            if master.dtype != self.flat_weights.dtype:
                self.flat_weights[own.start : own.stop].copy_(master)
        if self.is_sharded:
            self.replicas.gather(self.flat_weights)

    # -- state by parameter, which does not depend on the layout; any rank may call these alone, unless they say otherwise --------

    def owned_names(self) -> list[str]:
        """Parameters of which this rank updates a part that counts. A weight of several stages counts on one of them."""
        return [name for name in self.local_names() if name not in self._process_groups.tied_copies]

    def local_names(self) -> list[str]:
        """Parameters of which this rank updates a part: also of its copies of tied and shared weights."""
        return [name for name in self._layout.places if name in self._states]

    def state(self, name: str) -> list[StatePart]:
        """What this rank holds of a parameter's master weight (``weight``) and of its optimizer states, in at least float32."""
        return self._states.get(name, [])

    @torch.no_grad()
    def saved_state(self) -> dict[str, dict[str, Tensor]]:
        """A copy, in host memory, of the state that this rank saves: by exported name, whole tensors in the parameter's shape. Over all
        ranks each parameter is saved once.

        With ZeRO 1 all replicas call it together.
        """
        saved: dict[str, dict[str, Tensor]] = {}
        for name in self.owned_names():
            if self._layout.keepers[name] == self.replicas.own:
                shape, parts = self._layout.places[name].shape, self._states[name]
                saved[name] = {
                    key: torch.empty(shape, dtype=own.dtype, device="cpu") for key, own in parts[0].values.items()
                }
                for part in parts:
                    for key, own in part.values.items():
                        _set(saved[name][key], part.elements, own)
        for piece in self._layout.pieces:
            divided = [name for name in self._layout.divided_in(piece) if name not in self._process_groups.tied_copies]
            for key in dict.fromkeys(key for name in divided for key in (WEIGHT, *self._layout.places[name].states)):
                self._gather_state(piece, divided, key, saved)
        return saved

    def _gather_state(
        self, piece: range, names: Sequence[str], key: str, saved: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Complete one state of the parameters ``names``, as far as they lie in a piece, on the replicas that save them."""
        own = self._layout.slice(piece, self.replicas.own)
        values = self.flat_gradients.new_zeros(len(own))
        for name in names:
            for held, part in zip(self._own_parts.get(name, ()), self.state(name), strict=True):
                if overlap(held, own) and key in part.values:
                    values[held.start - own.start : held.stop - own.start] = part.values[key]
        gathered = self.replicas.gather_piece(values)
        for name in names:
            if key in saved.get(name, {}):
                place = self._layout.places[name]
                common = overlap(piece, range(place.begin, place.end))
                elements = range(common.start - place.begin, common.stop - place.begin)
                _set(saved[name][key], elements, gathered[common.start - piece.start : common.stop - piece.start])

    def restore_finished(self, step_count: int) -> None:
        """Complete a restore, after every `state` has been written: set the step and publish the weights.

        With ZeRO 1 all replicas call it together.
        """
        self.step_count = step_count
        with torch.no_grad():
            self._publish()


def _set(tensor: Tensor, elements: range, values: Tensor) -> None:
    """Set elements of a flattened tensor."""
    tensor.view(-1)[elements.start : elements.stop] = values


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
