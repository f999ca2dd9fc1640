"""Connections whose residual matrix is a mixture of all permutations of the streams: mHC-lite (arXiv 2601.05732)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lime_dist.config.registry import CONNECTIONS
from lime_dist.model.architecture import Flops
from lime_dist.model.architectures.hyper.constrained import ConstrainedConnection

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MOST_STREAMS = 6


@CONNECTIONS.register("permutations")
class PermutationConnection(ConstrainedConnection):
    """H_res = Σ_k softmax(z)_k · P_k over the n! permutation matrices, the identity first: doubly stochastic without iterations."""

    title = "mHC-lite"

    def check(self) -> None:
        super().check()
        if self.rate > MOST_STREAMS:
            raise ValueError(
                f"model.hyper.rate={self.rate} has {math.factorial(self.rate):,} permutations; model.hyper.connection=permutations "
                f"needs model.hyper.rate={MOST_STREAMS} or less, or set model.hyper.connection=doubly_stochastic"
            )

    @property
    def num_logits(self) -> int:
        return math.factorial(self.rate)

    def make(self) -> nn.Module:
        from lime_dist.model.architectures.hyper.modules.constrained import ConstrainedStreamConnection
        from lime_dist.model.architectures.hyper.modules.permutations import mixture_of_permutations

        return ConstrainedStreamConnection(
            self.rate, self.hidden, self.num_logits, self.config.rms_norm_eps, mixture_of_permutations
        )

    def initialise_bias(self, layer: int, value: Tensor) -> None:
        """As in the authors' code: the identity has e⁸ times the weight of any other permutation, and the sub-layers of layer k read
        and write stream k mod n more than others."""
        value.fill_(-1.0)
        value[2 * self.rate :] = -8.0
        value[[layer % self.rate, self.rate + layer % self.rate]] = 1.0
        value[2 * self.rate] = 0.0

    def initialise_mapping(self, value: Tensor, generator: torch.Generator) -> None:
        """0, as in the authors' code."""
        value.zero_()

    def flops(self) -> Flops:
        """The permutations' matrices have no gradient."""
        mixing = 2 * self.num_logits * self.rate**2
        return super().flops() + Flops(mixing, mixing)

    def kept_of_residual(self) -> int:
        return self.num_logits  # softmax
