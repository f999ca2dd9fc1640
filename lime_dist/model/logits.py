"""From products of hidden states and the output projection to logits, and the losses that keep logits small."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lime_dist.config.schema import ModelConfig
from lime_dist.model.scaling import logit_scale


@dataclass(frozen=True)
class LogitForm:
    """logits = c · tanh(s · products / c), or s · products without a bound.

    Attributes:
        scale: s; see `scaling`.
        softcap: c, ``model.numerics.logit_softcap``; None: no bound.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> LogitForm:
        return cls(logit_scale(config), config.numerics.logit_softcap)

    def logits(self, products: Tensor) -> Tensor:
        """The logits of products, of the same shape."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def logits_(self, products: Tensor) -> Tensor:
        """`logits` in the memory of the products."""
        if self.scale != 1:
            products.mul_(self.scale)
        return products if self.softcap is None else products.div_(self.softcap).tanh_().mul_(self.softcap)

    def product_gradient_(self, bounded: Tensor | None, gradient: Tensor) -> Tensor:
        """The gradient of the products, in the memory of that of the logits: times s · (1 − (logits / c)²).

        Args:
            bounded: the logits, if there is a bound; they are overwritten.
        """
        if bounded is not None and self.softcap is not None:
            gradient.mul_(bounded.div_(self.softcap).square_().neg_().add_(1))
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


PLAIN = LogitForm()
