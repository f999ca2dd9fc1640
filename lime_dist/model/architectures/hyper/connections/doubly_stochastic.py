"""Connections whose residual matrix Sinkhorn–Knopp makes doubly stochastic: mHC (arXiv 2512.24880)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lime_dist.config.registry import CONNECTIONS
from lime_dist.model.architectures.hyper.constrained import ConstrainedConnection

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@CONNECTIONS.register("doubly_stochastic")
class DoublyStochasticConnection(ConstrainedConnection):
    """H_res: exp of n×n weights, then rows and columns are divided by their sums in turn, 20 times."""

    title = "Manifold-constrained Hyper-Connections (mHC)"

    @property
    def num_logits(self) -> int:
        return self.rate**2

    def make(self) -> nn.Module:
        from lime_dist.model.architectures.hyper.modules.constrained import ConstrainedStreamConnection
        from lime_dist.model.architectures.hyper.modules.sinkhorn import doubly_stochastic

        return ConstrainedStreamConnection(
            self.rate, self.hidden, self.num_logits, self.config.rms_norm_eps, doubly_stochastic
        )

    def initialise_bias(self, layer: int, value: Tensor) -> None:
        """0, as in Megatron: at first the streams are averaged."""
        value.zero_()

    def initialise_mapping(self, value: Tensor, generator: torch.Generator) -> None:
        """N(0, 0.02²) like other matrices. Megatron draws Xavier's uniform values, whose deviation at n = 4 and D = 1280 is the same."""
        value.normal_(0.0, 0.02, generator=generator)

    def kept_of_residual(self) -> int:
        return self.outputs  # z, of which the n×n weights are a part; backward computes the iterations again
