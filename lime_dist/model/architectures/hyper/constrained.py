"""What connections with constrained weights share (mHC, arXiv 2512.24880): x ← H_res·x + H_postᵀ·F(H_pre·x).

With x⃗ = vec(x) ∈ R^{nD} and x⃗' = x⃗ / rms(x⃗), the weights of a token are z = s ⊙ (W·x⃗') + b. The first n give H_pre = σ(z), the next n
H_post = 2σ(z), the others the doubly stochastic H_res: how is the kind's own. The gain of the paper's RMSNorm is part of W. The scale s has
one value for each of the three parts. F begins with an RMSNorm, as in Megatron's code.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from lime_dist.model.architecture import Flops, Group, Sizes
from lime_dist.model.architectures.hyper.connection import Connection
from lime_dist.model.transformer import Activations, norm_parameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MAPPING, BIAS, SCALES = "mapping_proj.weight", "static_bias", "scales"
INITIAL_SCALE = 0.01


class ConstrainedConnection(Connection):
    """A kind whose H_res is doubly stochastic, so that no stream grows from layer to layer by mixing."""

    code = "constrained_hyper_lime.py"

    def check(self) -> None:
        if not self.config.hyper.dynamic:
            name = self.config.hyper.connection
            raise ValueError(f"model.hyper.dynamic=false needs model.hyper.connection=free, not {name}")

    @property
    @abstractmethod
    def num_logits(self) -> int:
        """Number of weights from which H_res is made."""

    @property
    def outputs(self) -> int:
        """Number of weights of a token."""
        return 2 * self.rate + self.num_logits

    def make_norm(self) -> nn.Module:
        from lime_dist.model.layers import RMSNorm

        return RMSNorm(self.hidden, self.config.rms_norm_eps)

    # -- parameters ---------------------------------------------------------------------------------------------------

    def parameters(self) -> Sizes:
        return {MAPPING: self.outputs * self.rate * self.hidden, BIAS: self.outputs, SCALES: 3}

    def norm_parameters(self) -> Sizes:
        return norm_parameters(self.config)

    def parameter_group(self, name: str) -> Group:
        """W is a matrix like others, as in DeepSeek-V4, whose biases and scales are apart from it."""
        return "matrices" if name == MAPPING else "plain"

    def initialise(self, name: str, layer: int, value: Tensor, generator: torch.Generator) -> None:
        if name == SCALES:
            value.fill_(INITIAL_SCALE)
        elif name == BIAS:
            self.initialise_bias(layer, value)
        else:
            self.initialise_mapping(value, generator)

    @abstractmethod
    def initialise_bias(self, layer: int, value: Tensor) -> None:
        """Fill b, [2n + num_logits]."""

    @abstractmethod
    def initialise_mapping(self, value: Tensor, generator: torch.Generator) -> None:
        """Fill W, [2n + num_logits, nD]."""

    # -- costs --------------------------------------------------------------------------------------------------------

    def flops(self) -> Flops:
        products = 2 * self.rate * self.hidden * (self.outputs + self.rate + 1)
        return Flops(products, 2 * products)

    def activations(self, streams: int) -> Activations:
        rate, hidden = self.rate, self.hidden
        copied = rate * hidden if streams < rate else 0  # views of the embedding, as one vector
        return Activations(
            # Input, mixtures; input and output of the sub-layer; the matrix, H_post.
            per_token=streams * hidden + copied + (rate + 1) * hidden + 2 * hidden + (rate + 1) * rate + rate,
            # 1 / rms of x⃗ and of the norm's input; W·x⃗ before and after division by rms; sigmoids; z.
            accumulated_per_token=2 + 2 * self.outputs + 2 * rate + self.kept_of_residual(),
            accumulated_fixed=self.outputs,  # s for each weight
        )

    @abstractmethod
    def kept_of_residual(self) -> int:
        """Elements per token, in at least float32, that are kept for the gradient of H_res."""
