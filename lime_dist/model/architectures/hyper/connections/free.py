"""Connections with free weights: Hyper-Connections (arXiv 2409.19606)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lime_dist.config.registry import CONNECTIONS
from lime_dist.model.architecture import Flops, Group, Sizes
from lime_dist.model.architectures.hyper.connection import Connection
from lime_dist.model.transformer import Activations

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DYNAMIC = ("dynamic_alpha", "dynamic_beta")


@CONNECTIONS.register("free")
class FreeConnection(Connection):
    """[m_0 | m_1 … m_n] = αᵀh; stream i becomes m_i + β_i · f(LN(m_0)).

    α = static α + s_α · tanh(LN(h)·W_α) and β likewise; without ``dynamic`` the static part alone. Norms have no weights.
    """

    title = "Hyper-Connections"
    code = "hyper_lime.py"

    @property
    def dynamic(self) -> bool:
        return self.config.hyper.dynamic

    def check(self) -> None:
        """The configuration's own types are enough."""

    def make(self) -> nn.Module:
        from lime_dist.model.architectures.hyper.modules.free import FreeStreamConnection

        return FreeStreamConnection(self.rate, self.hidden, self.dynamic)

    def make_norm(self) -> nn.Module:
        from lime_dist.model.architectures.hyper.modules.free import LayerNorm

        return LayerNorm()

    def parameters(self) -> Sizes:
        sizes = {"static_alpha": self.rate * (self.rate + 1), "static_beta": self.rate}
        if self.dynamic:
            sizes |= {"dynamic_alpha": self.hidden * (self.rate + 1), "dynamic_beta": self.hidden}
            sizes |= {"alpha_scale": 1, "beta_scale": 1}
        return sizes

    def norm_parameters(self) -> Sizes:
        return {}

    def parameter_group(self, name: str) -> Group:
        return "routers" if name in DYNAMIC else "plain"

    def initialise(self, name: str, layer: int, value: Tensor, generator: torch.Generator) -> None:
        """Static α = [e_{k mod n} | I_n] in layer k and β = 1_n: a pre-norm decoder; the dynamic part starts at 0, scaled
        by 0.01."""
        value.fill_({"static_beta": 1.0, "alpha_scale": 0.01, "beta_scale": 0.01}.get(name, 0.0))
        if name == "static_alpha":
            value[layer % len(value), 0] = 1.0
            value[:, 1:].fill_diagonal_(1.0)

    def flops(self) -> Flops:
        mixing = 2 * self.rate * self.hidden * (self.rate + 1 + (self.rate + 2 if self.dynamic else 0))
        return Flops(mixing, 2 * mixing)

    def activations(self, streams: int) -> Activations:
        rate, hidden = self.rate, self.hidden
        kept = (streams + rate + 1) * hidden  # input, mixtures
        kept += 2 * hidden + 2  # input and output of the sub-layer, mean and deviation (on a GPU in float32)
        if not self.dynamic:
            return Activations(per_token=kept)
        kept += rate * (hidden + 2)  # normed streams, mean and deviation
        kept += rate * (rate + 2) + rate * (rate + 1) + rate  # tanh, alpha, beta
        return Activations(per_token=kept, fixed=hidden * (rate + 2))  # alpha beside beta

    def received_activations(self) -> Activations:
        """The first layer transposes the streams."""
        return Activations() if self.dynamic else Activations(per_token=self.rate * self.hidden)
