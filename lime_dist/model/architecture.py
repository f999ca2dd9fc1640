"""What the program needs to know about a decoder architecture, as one object per architecture.

The objects live in `lime_dist.model.architectures`, one folder each, and register under the name that ``model.architecture``
takes. Everything else asks the object and never compares the name. An architecture that lacks a member fails when it is
imported.

The modules of this file and of the objects import neither torch nor DeepSpeed: plans are made without them.

Shapes: B batch, T tokens, N = B·T, L layers, D hidden size, H query heads, G key/value heads, d head size, F intermediate size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lime_dist.config.precision import accumulation_itemsize
from lime_dist.config.registry import ARCHITECTURES
from lime_dist.config.schema import ModelConfig
from lime_dist.model.chunks import Chunk, summarised_chunks
from lime_dist.model.crossing import ENTRIES, Crossing, Prices, crossings
from lime_dist.model.layout import StageLayout, block_ranges
from lime_dist.model.policies import HistoryPolicy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lime_dist.model.history import LayerHistory
    from lime_dist.model.transformer import Activations

Group = Literal["matrices", "plain", "routers"]
GROUPS: tuple[Group, ...] = ("matrices", "plain", "routers")
"""Optimizer groups. matrices: weight decay; plain (norms, embeddings): none; routers: none, and their own learning rate."""

Sizes = dict[str, int]
"""Number of elements by parameter name."""

CHUNKS = "model.history.chunks."
"""Prefix of the exported names of chunk summaries."""


def router_name(layer: int) -> str:
    """Prefix of the exported names of a layer's router."""
    return f"model.layers.{layer}.self_attn.router"


def mean_weights_name(layer: int) -> str:
    """Name of a layer's mean weights over tokens, [heads or reads, entries read], among the weights for a map."""
    return f"model.layers.{layer}.mean_weights"


BASELINE = "llama"
"""The architecture that plans compare with."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, of the forward and of the backward pass.

    Attributes:
        weights: the part of ``backward`` that a weight pass can take (`lime_dist.model.weight_gradients`).
    """

    forward: float
    backward: float
    weights: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.weights + other.weights)

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class ExportFormat:
    """How an exported model is written as a Hugging Face folder.

    Attributes:
        causal_class: name of the class that loads the model.
        values: keys of ``config.json`` beside the shape of the model.
        code: the file that defines ``causal_class``, and ``base_class``, which gives hidden states; files that it imports
            relatively go with it. A name alone is a file of `lime_dist.export.huggingface`. None: `transformers` has the class.
    """

    causal_class: str
    values: Mapping[str, Any]
    base_class: str | None = None
    code: str | Path | None = None


class Architecture(Protocol):
    """One architecture with one model configuration."""

    config: ModelConfig

    @property
    @abstractmethod
    def title(self) -> str:
        """Name of the architecture as its paper writes it."""

    @abstractmethod
    def check(self) -> None:
        """Refuse a configuration that the architecture cannot have.

        Raises:
            ValueError: names the keys and a way out.
        """

    # -- layer history and payload ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def policy(self) -> HistoryPolicy | None:
        """Which entries of the layer history a layer reads; None: the architecture has no layer history."""

    @property
    @abstractmethod
    def has_configurable_policy(self) -> bool:
        """Whether ``model.lime.history`` chooses the policy."""

    @property
    @abstractmethod
    def max_block_layers(self) -> int:
        """Most layers of a block, whose reads of older entries are batched."""

    @property
    @abstractmethod
    def entry_width(self) -> int:
        """Elements of one entry of the history, per token."""

    @property
    @abstractmethod
    def hidden_shape(self) -> tuple[int, ...]:
        """Shape of the hidden state of one token between two layers: (D,), or (n, D) with n residual streams."""

    @property
    @abstractmethod
    def receives_in_place(self) -> bool:
        """Whether a payload can be received into the memory of the history that it belongs to."""

    @property
    def can_offload_history(self) -> bool:
        """Whether the history of a micro-batch has memory of its own, whose content can be moved to host memory."""
        return self.policy is not None

    @property
    def mixtures_cross(self) -> bool:
        """Whether partial mixtures may cross boundaries instead of entries: a mixture is a sum over entries with weights that are
        known before its layer runs, and has the size of an entry."""
        return False

    @property
    def needs_tensor_mask(self) -> bool:
        """Whether the mask of documents is a tensor on every device, T elements per token."""
        return False

    @property
    def sums_sent_gradients(self) -> bool:
        """Whether gradients of entries that come back for what was sent begin the history's own sums, and these go back as they are."""
        return False

    @abstractmethod
    def entries_read(self, layer: int) -> int:
        """Number of history entries that a layer mixes with a router's weights; 0: it has no router."""

    @abstractmethod
    def slots_kept(self, layer: int) -> int:
        """Number of slots of a layer that its stage's history keeps. One that only its own layer reads may need no memory."""

    @abstractmethod
    def history_gradient_itemsize(self, itemsize: int) -> int:
        """Bytes per element of the buffer that keeps the gradients of entries during backward, beside the entries; 0: none.

        Args:
            itemsize: of the entries.
        """

    # -- modules ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def make_layer(self, layer: int) -> nn.Module:
        """Decoder layer ``layer``: called with the hidden state and the history (or None), returns the hidden state."""

    def make_router(self, layer: int) -> nn.Module:
        """The router of a layer, apart from the layer; with ``mixtures_cross`` only."""
        raise NotImplementedError

    @abstractmethod
    def make_summary(self, chunk: Chunk) -> nn.Module:
        """The module with the weights of a chunk's summary."""

    @abstractmethod
    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        """An empty history of one micro-batch on one stage.

        Args:
            lead: elements before the entries in the same memory, where a received hidden state lies.
        """

    @abstractmethod
    def first_input(self, embedded_BTD: Tensor) -> Tensor:
        """What the first decoder layer takes, [B, T, *hidden_shape], from embedded tokens."""

    @abstractmethod
    def last_output(self, hidden: Tensor) -> Tensor:
        """What the final norm takes from the hidden state after the last decoder layer: [B, T, D], unless `make_final_norm` is overridden."""

    def make_final_norm(self) -> nn.Module:
        """The final norm: from ``last_output`` to what the output projection takes, [B, T, D]."""
        from lime_dist.model.layers import RMSNorm

        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)

    # -- parameters ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def layer_parameters(self, layer: int) -> Sizes:
        """Parameters of decoder layer ``layer``, by name within the layer."""

    def final_norm_parameters(self) -> Sizes:
        """Parameters of the final norm, by name within it."""
        return {"weight": self.config.hidden_size}

    @abstractmethod
    def summary_parameters(self, chunk: Chunk) -> int:
        """Number of elements of a chunk summary's weight."""

    @abstractmethod
    def parameter_group(self, name: str) -> Group:
        """Optimizer group of an exported parameter name.

        Raises:
            ValueError: the architecture has no such parameter.
        """

    @abstractmethod
    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Fill ``value`` (float32, on the CPU) with the initial value of an exported parameter."""

    # -- costs --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def layer_flops(self, sequence_length: float, layers: range, prices: Prices) -> list[Flops]:
        """FLOPs of matrix products per token, by layer of a stage that holds ``layers``.

        With a document mask, ``sequence_length`` is the length in which causal attention reads as many keys per token.
        Summaries count with the last layer of their chunk, parts of later mixtures as `crossing.pairs_by_layer` says.
        """

    def final_norm_flops(self) -> Flops:
        """FLOPs of matrix products per token, of the final norm."""
        return Flops(0, 0)

    def final_norm_activation_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Bytes that autograd keeps of the final norm: its input and the root mean square."""
        return num_tokens * (itemsize * self.config.hidden_size + accumulation_itemsize(itemsize))

    @abstractmethod
    def activation_bytes(self, layer: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        """Bytes that autograd keeps of a decoder layer; see `cost.activation_bytes`."""

    def feed_forward_activations(self) -> Activations:
        """What autograd does not keep of a layer whose feed-forward half backward computes again: of the MLP, and the output and root
        mean square of its norm."""
        from lime_dist.model.transformer import Activations

        return Activations(4 * self.config.intermediate_size + self.config.hidden_size, accumulated_per_token=1)

    def feed_forward_flops(self, defers_weights: bool) -> float:
        """FLOPs of matrix products per token that computing a feed-forward half again takes. It ends with the last tensor that autograd
        keeps: the input of the down projection.

        Args:
            defers_weights: whether the weight gradients come later. Then the down projection runs again, too.
        """
        products = 3 if defers_weights else 2
        return products * 2 * self.config.hidden_size * self.config.intermediate_size

    def weight_pass_bytes(self, layer: int, num_tokens: int, itemsize: int) -> int:
        """Bytes that a weight pass keeps of a decoder layer while it is held back: inputs and output gradients of projections."""
        from lime_dist.model.transformer import weight_pass_activations

        return weight_pass_activations(self.config).nbytes(num_tokens, itemsize)

    def received_activation_bytes(self, boundary: int, num_tokens: int, itemsize: int, checkpointing: bool) -> int:
        """Bytes that a stage keeps of a received payload; see `cost.received_activation_bytes`. By default none: the hidden state is
        the first layer's input, and the rest is the history's."""
        return 0

    @abstractmethod
    def block_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool, prices: Prices
    ) -> int:
        """Bytes that the history of a stage that holds ``layers`` needs in backward while it goes through a block of them, beside
        its entries and the gradients of all entries (`history_gradient_itemsize`)."""

    def backward_blocks(self, layers: range) -> list[range]:
        """The layers of a stage, ascending, in blocks for which the history needs the same memory in backward."""
        if self.policy is None:
            return [layers]
        return block_ranges(layers, chunk_ends(self.config), self.max_block_layers)

    def feed_forward_history_bytes(
        self, layers: range, layer: int, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        """Bytes that the history of a stage that holds ``layers`` needs, beside its entries, during the backward pass of a layer's
        SwiGLU."""
        return 0

    @abstractmethod
    def read_gradient_bytes(
        self, layers: range, block: range, num_tokens: int, itemsize: int, checkpointing: bool
    ) -> int:
        """Bytes of the largest temporary tensors in the backward pass of what the last layer of a block reads, less what of
        `block_gradient_bytes` is no longer needed then.

        Args:
            layers: of the stage.
        """

    def received_gradient_bytes(self, entries: int, num_tokens: int, itemsize: int) -> int:
        """Bytes of the gradients of the entries that a stage received, and of what computes them, if the history has a buffer for
        gradients: gradients of entries and of states, and three temporary tensors of the norm."""
        elements = entries * self.entry_width * num_tokens
        return elements * (2 * itemsize + 3 * accumulation_itemsize(itemsize))

    @abstractmethod
    def entries_moved(self, parts: Sequence[range], prices: Prices) -> float:
        """Memory traffic of the history of a stage in forward, in entries read or written.

        Args:
            parts: the layers of each part of the stage.
        """

    # -- pictures of routers ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def router_map_obstacle(self) -> str | None:
        """Why no map can be drawn from parameters alone; None: it can."""

    @property
    def has_mean_map(self) -> bool:
        """Whether layers read with weights that depend on the token, so that a map shows their means (`mean_weights_name`)."""
        return False

    @property
    def first_column(self) -> int:
        """What the first column of a map is: layer 0, or at −1 the embedding."""
        return 0

    @property
    def row_kind(self) -> str:
        """What a row of `head_map` is, in one word."""
        return "head"

    def row_name(self, layer: int, row: int) -> str:
        """A row of a layer's mean weights, in words."""
        return f"{self.row_kind} {row}"

    def column_name(self, layer: int, column: int) -> str:
        """A column of a layer's mean weights, in words."""
        raise NotImplementedError("the weights depend on no token")

    @property
    @abstractmethod
    def router_parameters(self) -> Sequence[str]:
        """Exported names that a map of router weights may need; some layers lack some of them."""

    @abstractmethod
    def head_map(self, weights: Mapping[str, Tensor], layer: int) -> Tensor:
        """How much each head of a layer reads of every layer, [heads, layers from ``first_column`` on].

        Raises:
            KeyError: a weight is missing.
            RuntimeError: a weight has another shape.
        """

    # -- export -------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def export_format(self) -> ExportFormat:
        """How `lime_dist.export` writes the model."""

    @abstractmethod
    def check_llama_start(self) -> None:
        """Refuse to start from the weights of a LLaMA if the first loss would not be the LLaMA's.

        Raises:
            ValueError: says which keys to change.
        """


@lru_cache(maxsize=64)
def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that a configuration names."""
    architecture: Architecture = ARCHITECTURES[config.architecture](config)
    return architecture


@lru_cache(maxsize=256)
def stage_layout(config: ModelConfig, *parts: range, prices: Prices = ENTRIES) -> StageLayout | None:
    """Where a stage keeps its history whose parts hold these decoder layers; None for models without one."""
    architecture = architecture_of(config)
    if architecture.policy is None:
        return None
    prices = _possible(architecture, prices)
    return StageLayout(architecture.policy, parts, config.num_hidden_layers, architecture.max_block_layers, prices)


def model_crossings(config: ModelConfig, prices: Prices = ENTRIES) -> Sequence[Crossing]:
    """What crosses the boundary before each decoder layer 0 … L, beside the hidden state."""
    architecture = architecture_of(config)
    if architecture.policy is None:
        return [Crossing()] * (config.num_hidden_layers + 1)
    prices = _possible(architecture, prices)
    return crossings(architecture.policy, config.num_hidden_layers, prices)


def _possible(architecture: Architecture, prices: Prices) -> Prices:
    """The prices without that of partial mixtures where they cannot cross."""
    return prices if architecture.mixtures_cross else replace(prices, entry=1, mixture=None)


@lru_cache(maxsize=64)
def chunk_ends(config: ModelConfig) -> Mapping[int, Chunk]:
    """The chunks that are summarised, by their last layer."""
    policy = architecture_of(config).policy
    if policy is None:
        return {}
    return {chunk.layers[-1]: chunk for chunk in summarised_chunks(policy, config.num_hidden_layers)}
