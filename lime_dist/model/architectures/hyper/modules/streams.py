"""How a sub-layer reads from and writes to n residual streams, given a connection's weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor, nn


class StreamConnection(nn.Module):
    """Subclasses define the weights."""

    @abstractmethod
    def weights(self, streams_BTnD: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix that mixes the streams, [(B, T,) n + 1, n], first row for the sub-layer's input; and the factors with which the
        streams take the sub-layer's output, [(B, T,) n]."""

    def forward(self, streams_BTnD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[m_0 | m_1 … m_n] = matrix · streams; returns m_i + factor_i · sublayer(m_0) for i = 1 … n."""
        matrix, factors = self.weights(streams_BTnD)
        mixed = matrix @ streams_BTnD
        out_BTD = sublayer(mixed[..., 0, :])
        return mixed[..., 1:, :] + factors.unsqueeze(-1) * out_BTD.unsqueeze(-2)
