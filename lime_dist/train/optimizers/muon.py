"""Muon: matrices move by their orthogonalised momentum, everything else by AdamW.

The update of a matrix W of shape m × n with gradient G, from the momentum M (K. Jordan, 2024):

    M ← μ·M + G        U = G + μ·M        W ← W − lr·λ·W − lr·0.2·√max(m, n)·O(U)

O(U) is U with all singular values moved to about 1, by five Newton–Schulz iterations. The factor 0.2·√max(m, n) gives an update the
usual size of AdamW's (Moonlight, arXiv 2502.16982), so that both parts share ``optimizer.lr`` and ``optimizer.weight_decay``.

Which matrices: the projections of attention and of the MLP, each as one matrix; heads are not taken apart. Embeddings, output
projection, norms, routers, gates and the small matrices of connections use AdamW. With ZeRO 1 each replica orthogonalises
whole matrices of its own, and everything else is divided evenly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lime_dist.config.registry import OPTIMIZERS
from lime_dist.config.schema import OptimizerConfig
from lime_dist.model.architecture import Group
from lime_dist.train.optimizers.adamw import AdamW
from lime_dist.train.optimizers.base import Optimizer, ParameterGroup, assign

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = re.compile(r"\.(self_attn|mlp)\.\w+_proj\.weight$")
"""Exported names of the matrices."""
MOMENTUM = "momentum"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a·x + b·x³ + c·x⁵ that an iteration applies to the singular values."""
ITERATIONS = 5
RMS = 0.2


@OPTIMIZERS.register("muon")
class Muon(Optimizer):
    """One momentum of each matrix, AdamW's two moments of everything else."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._momentum, self._rest = config.momentum, AdamW(config)

    def states(self, name: str, group: Group) -> tuple[str, ...]:
        return (MOMENTUM,) if MATRICES.search(name) else self._rest.states(name, group)

    def is_elementwise(self, name: str, group: Group) -> bool:
        return not MATRICES.search(name)

    def update(self, groups: Sequence[ParameterGroup], step: int, skip: Tensor) -> None:
        self._rest.update([group for group in groups if MOMENTUM not in group.states], step, skip)
        for group in groups:
            if MOMENTUM in group.states:
                self._update_matrices(group, skip)

    def _update_matrices(self, group: ParameterGroup, skip: Tensor) -> None:
        momentum = group.states[MOMENTUM]
        assign(momentum, momentum * self._momentum + group.gradient, skip)
        for name, span in group.spans.items():
            weight, gradient = group.view(group.weight, name), group.view(group.gradient, name)
            direction = gradient.add(group.view(momentum, name), alpha=self._momentum)
            size = group.lr * RMS * math.sqrt(max(span.shape))
            moved = weight.mul(1 - group.lr * group.weight_decay).sub_(orthogonal(direction), alpha=size)
            assign(weight, moved, skip)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with singular values of about 1 (0.7 to 1.2 if they were not tiny), in its type. On GPUs float32 is computed in
    bfloat16."""
    import torch  # not at the top of the file: plans read `states` and do not import torch

    a, b, c = COEFFICIENTS
    in_bf16 = matrix.device.type != "cpu" and matrix.dtype == torch.float32
    wide = matrix.to(torch.bfloat16) if in_bf16 else matrix
    is_tall = wide.shape[0] > wide.shape[1]
    x = wide.t() if is_tall else wide
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above the Frobenius norm
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.t() if is_tall else x).to(matrix.dtype)
