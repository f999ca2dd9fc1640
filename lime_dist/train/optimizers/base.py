"""What an optimizer is: which states it keeps of a parameter, and one update of the parameters of a rank.

`StageOptimizer` does what all optimizers share: it accumulates and reduces gradients, shards states (ZeRO 1), clips by the
global norm and publishes the new weights. It asks the optimizer for the states to allocate and hands it the groups to update.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from lime_dist.config.schema import OptimizerConfig
from lime_dist.model.architecture import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Where one parameter lies in the flat tensors of its `ParameterGroup`."""

    begin: int
    end: int
    shape: tuple[int, ...]


@dataclass
class ParameterGroup:
    """Parameters of one optimizer group that keep the same states, one after the other in flat tensors of n elements.

    Attributes:
        group: the optimizer group.
        spans: place of each parameter, by exported name. Those whose update works by element may be parts of parameters, which are
            flat then; all others are whole.
        weight: master weights [n].
        gradient: gradients [n], averaged and clipped.
        states: the optimizer's states [n] each, by name; zero before the first update.
        weight_decay: weight decay of the group.
        lr: learning rate of the next update.
    """

    group: Group
    spans: Mapping[str, Span]
    weight: Tensor
    gradient: Tensor
    states: Mapping[str, Tensor]
    weight_decay: float
    lr: float = 0.0

    def of_zeros(self) -> ParameterGroup:
        """A group of one parameter of each shape of this one; weights, gradients and states are zero, in memory of their own."""
        spans: dict[tuple[int, ...], Span] = {}
        names: dict[tuple[int, ...], str] = {}
        end = 0
        for name, span in self.spans.items():
            if span.shape not in spans:
                begin, end = end, end + span.end - span.begin
                spans[span.shape], names[span.shape] = Span(begin, end, span.shape), name
        return replace(
            self,
            spans={names[shape]: span for shape, span in spans.items()},
            weight=self.weight.new_zeros(end),
            gradient=self.gradient.new_zeros(end),
            states={name: state.new_zeros(end) for name, state in self.states.items()},
        )

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The part of one of the flat tensors that belongs to a parameter, in the parameter's shape; writable."""
        span = self.spans[name]
        return flat[span.begin : span.end].view(span.shape)


class Optimizer(Protocol):
    """An update rule. Its object holds no tensors: states lie in the groups that `update` is given."""

    @abstractmethod
    def __init__(self, config: OptimizerConfig) -> None: ...

    @abstractmethod
    def states(self, name: str, group: Group) -> tuple[str, ...]:
        """Names of the tensors that are kept of a parameter beside its master weight.

        Each has the parameter's shape and the type of the master weight. Parameters of one group may differ in their states.

        Args:
            name: exported name of the parameter.
            group: its optimizer group.
        """

    def is_elementwise(self, name: str, group: Group) -> bool:
        """Whether the update of an element depends on nothing but its own gradient, weight and states. With ZeRO 1, replicas then
        divide the parameter; by default each parameter is updated whole, by one replica.

        Args: as of `states`.
        """
        return False

    @abstractmethod
    def update(self, groups: Sequence[ParameterGroup], step: int, skip: Tensor) -> None:
        """Update weights and states in place, or leave all of them as they are, without waiting for the device.

        Args:
            groups: the parameters that this rank updates; empty if there are none. A rule for whole matrices takes each in its
                shape from `ParameterGroup.view`.
            step: 1 for the first update.
            skip: float32 scalar on the device. 1: gradients are not finite, and nothing may change; 0: update. `assign` and
                torch's fused optimizers (``found_inf``) take it.
        """


def assign(target: Tensor, value: Tensor, skip: Tensor) -> None:
    """Set ``target`` to ``value`` in place, unless ``skip`` is 1."""
    import torch  # not at the top of the file: plans read `Optimizer.states` and do not import torch

    target.copy_(torch.where(skip > 0, target, value))
