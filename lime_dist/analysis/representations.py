"""The representations of text in an exported model, by layer: the values that attention reads, and the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lime_dist.export.exported import ExportedModel, within_documents
from lime_dist.model.mean_weights import stacked

KINDS = {"values": "values that attention reads", "states": "hidden states"}
"""Kinds of representations. Values: of each layer, [T, G·d], after the mixture over layers. States: the input of each layer and
the output of the last norm, [T, D], so one more than there are layers; with Hyper-Connections the sum of the streams."""


@dataclass(frozen=True)
class Representations:
    """Representations of one sample of T tokens.

    Attributes:
        tokens: [T].
        layers: by kind (`KINDS`), by layer, [T, elements] in float32.
        routing: weights by layer with a dynamic router, [T, H, entries read]; with mixture-of-depths attention the shares of attention
            that each entry has, and last that of the sequence; with attention residuals those of each read, [T, reads, blocks].
    """

    tokens: Tensor
    layers: Mapping[str, Sequence[Tensor]]
    routing: Mapping[int, Tensor]


def representations(
    exported: ExportedModel, samples: Iterator[Tensor], eos: int | None = None
) -> Iterator[Representations]:
    """Run a model over samples of tokens, [T] each, one at a time.

    Args:
        eos: the token that ends every document, for attention within documents; None: attention crosses them.
    """
    from transformers import DynamicCache

    class Recorder(DynamicCache):
        """The key/value cache of one sample; records the values that each layer stores."""

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *more: Any, **other: Any) -> Any:
            values[layer_idx] = value_states[0].transpose(0, 1).flatten(1)
            return super().update(key_states, value_states, layer_idx, *more, **other)

    routing: dict[int, Tensor] = {}
    reads: dict[int, list[Tensor]] = {}

    def watch(layer: int) -> Callable[[Any, Any, Tensor], None]:
        def keep(module: Any, given: Any, weights: Tensor) -> None:
            routing[layer] = weights

        return keep

    def watch_read(layer: int) -> Callable[[Any, Any, Tensor], None]:
        def keep(module: Any, given: Any, mixture: Tensor) -> None:
            reads[layer].append(module.weights(*given)[:, 0].t().unsqueeze(1))  # [T, 1, outputs]

        return keep

    routers, depth_readers = dynamic_routers(exported), readers_over_depth(exported)
    hooks = [router.register_forward_hook(watch(layer)) for layer, router in routers.items()]
    readers = residual_readers(exported)
    hooks += [module.register_forward_hook(watch_read(layer)) for layer in readers for module in readers[layer]]
    try:
        for tokens in samples:
            values: dict[int, Tensor] = {}
            reads |= {layer: [] for layer in readers}
            tokens_BT = tokens.unsqueeze(0).to(exported.model.device)
            with torch.no_grad():
                output = exported.model(
                    tokens_BT,
                    **({} if eos is None else within_documents(tokens_BT, eos)),
                    past_key_values=Recorder(),
                    use_cache=True,
                    output_hidden_states=True,
                    output_attentions=bool(depth_readers),
                    logits_to_keep=1,
                )
            routing |= {layer: depth_shares(output.attentions[layer][0], n) for layer, n in depth_readers.items()}
            routing |= {layer: stacked(of_layer) for layer, of_layer in reads.items()}
            layers = {
                "values": [values[layer].cpu() for layer in sorted(values)],
                "states": [state[0].cpu() for state in output.hidden_states],
            }
            yield Representations(tokens, layers, {layer: weights.cpu() for layer, weights in routing.items()})
    finally:
        for hook in hooks:
            hook.remove()


def dynamic_routers(exported: ExportedModel) -> dict[int, Any]:
    """Routers whose weights depend on the token, by layer."""
    routers = {}
    for layer, module in enumerate(exported.model.model.layers):
        router = getattr(module.self_attn, "router", None)
        if getattr(router, "is_dynamic", False):
            routers[layer] = router
    return routers


def residual_readers(exported: ExportedModel) -> dict[int, list[Any]]:
    """By layer, the modules with which attention residuals read; an export of an older version does not show their weights."""
    readers = {
        layer: [read for read in module.children() if hasattr(read, "query") and hasattr(read, "weights")]
        for layer, module in enumerate(exported.model.model.layers)
    }
    return {layer: modules for layer, modules in readers.items() if modules}


def readers_over_depth(exported: ExportedModel) -> dict[int, int]:
    """By layer whose attention also reads entries of earlier layers: their number."""
    counts = {layer: getattr(module, "num_entries", 0) for layer, module in enumerate(exported.model.model.layers)}
    return {layer: count for layer, count in counts.items() if count}


def depth_shares(weights_HTS: Tensor, num_entries: int) -> Tensor:
    """[T, H, entries + 1]: the share of each entry, and of the sequence, in attention [H, T, tokens + columns of entries]."""
    sequence, depth = weights_HTS.tensor_split([weights_HTS.shape[1]], -1)
    by_entry = depth.unflatten(-1, (num_entries, -1)).sum(-1)
    return torch.cat([by_entry, sequence.sum(-1, keepdim=True)], -1).transpose(0, 1)


def matrix_entropy(rows: Tensor) -> float:
    """The von Neumann entropy, in nats, of Z·Zᵀ / tr(Z·Zᵀ) for Z [T, elements]: the entropy of its eigenvalues, whose sum is 1.

    0: all rows lie on one line; ln(min(T, elements)), the maximum: they spread evenly over all directions. (Giraldo et al.,
    arXiv 1211.2459, in the limit α → 1, as used by Skean et al., arXiv 2502.02013.)
    """
    rows = rows.double()
    gram = rows @ rows.t() if len(rows) <= rows.shape[1] else rows.t() @ rows
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.special.entr(eigenvalues / eigenvalues.sum().clamp_min(torch.finfo(rows.dtype).tiny)).sum().item()


def mean_and_error(numbers: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    values = torch.tensor(numbers, dtype=torch.float64)
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0


class EntropyByLayer:
    """The mean `matrix_entropy` over samples, by kind and layer."""

    def __init__(self) -> None:
        self._entropies: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}

    def add(self, sample: Representations) -> None:
        for kind, layers in sample.layers.items():
            by_layer = self._entropies[kind]
            by_layer += [[] for _ in range(len(layers) - len(by_layer))]
            for entropies, rows in zip(by_layer, layers, strict=True):
                entropies.append(matrix_entropy(rows))

    def summary(self) -> dict[str, list[tuple[float, float]]]:
        """By kind, by layer: mean and standard error over samples, in nats."""
        return {
            kind: [mean_and_error(entropies) for entropies in by_layer] for kind, by_layer in self._entropies.items()
        }
