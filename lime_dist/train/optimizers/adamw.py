"""AdamW (arXiv 1711.05101), torch's fused implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lime_dist.config.registry import OPTIMIZERS
from lime_dist.config.schema import OptimizerConfig
from lime_dist.model.architecture import Group
from lime_dist.train.optimizers.base import Optimizer, ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("adamw")
class AdamW(Optimizer):
    """Adam with decoupled weight decay; two moments of every parameter."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._betas, self._eps = config.betas, config.eps

    def states(self, name: str, group: Group) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def is_elementwise(self, name: str, group: Group) -> bool:
        return True

    def update(self, groups: Sequence[ParameterGroup], step: int, skip: Tensor) -> None:
        import torch  # not at the top of the file: plans read `states` and do not import torch
        from torch.optim.adamw import adamw

        beta1, beta2 = self._betas
        for group in groups:
            adamw(
                [group.weight],
                [group.gradient],
                [group.states["exp_avg"]],
                [group.states["exp_avg_sq"]],
                max_exp_avg_sqs=[],
                state_steps=[torch.full((), step - 1.0, device=group.weight.device)],  # adamw counts this update itself
                fused=True,
                found_inf=skip,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group.lr,
                weight_decay=group.weight_decay,
                eps=self._eps,
                maximize=False,
            )
