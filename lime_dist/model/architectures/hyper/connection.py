"""What Hyper-Connections need to know about a kind of connection, as one object per kind.

The objects live in `connections`, one file each, and register under the name that ``model.hyper.connection`` takes; their
modules are in `modules`. Like architectures they import no torch: plans are made without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import Flops, Group, Sizes
from lime_dist.model.transformer import Activations

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Connection(ABC):
    """How a sub-layer (attention, SwiGLU) reads and writes n = ``model.hyper.rate`` residual streams.

    A connection gives, for each token or for all, a matrix with a row for the sub-layer's input and one for every stream, and a
    factor with which each stream takes the sub-layer's output (`modules.streams.StreamConnection`).
    """

    title: ClassVar[str]
    code: ClassVar[str]
    """The file of an export's modelling code."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.rate, self.hidden = config.hyper.rate, config.hidden_size

    @abstractmethod
    def check(self) -> None:
        """Refuse a configuration that the kind cannot have.

        Raises:
            ValueError: names the keys and a way out.
        """

    @abstractmethod
    def make(self) -> nn.Module:
        """The module of one connection, a `StreamConnection`."""

    @abstractmethod
    def make_norm(self) -> nn.Module:
        """The pre-norm of a sub-layer, [B, T, D] -> [B, T, D]."""

    # -- parameters ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def parameters(self) -> Sizes:
        """Parameters of one connection, by name within it."""

    @abstractmethod
    def norm_parameters(self) -> Sizes:
        """Parameters of a layer's pre-norms, by name within the layer."""

    @abstractmethod
    def parameter_group(self, name: str) -> Group:
        """Optimizer group of one of `parameters`."""

    @abstractmethod
    def initialise(self, name: str, layer: int, value: Tensor, generator: torch.Generator) -> None:
        """Fill ``value`` with the initial value of one of `parameters`, in a connection of layer ``layer``."""

    # -- costs --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def flops(self) -> Flops:
        """FLOPs of matrix products per token, of one connection."""

    @abstractmethod
    def activations(self, streams: int) -> Activations:
        """What autograd keeps of one connection and of its sub-layer's norm; ``streams``: of its input that are memory of their
        own, n, or 1 where all are views of the embedding."""

    def received_activations(self) -> Activations:
        """What the first layer of a stage keeps of the received streams, beside `activations`."""
        return Activations()
