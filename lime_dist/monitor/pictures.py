"""What layers read, for TensorBoard: maps as images, scalars of each layer, histograms of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard.summary import histogram, scalar

from lime_dist.config.schema import ModelConfig
from lime_dist.model.architecture import architecture_of
from lime_dist.monitor.map_image import encoded, map_image
from lime_dist.monitor.routers import Weights, entropy, has_mean_map, head_map, router_map, self_retrieval


def router_pictures(config: ModelConfig, weights: Weights, chosen: int) -> list[Summary]:
    """All summaries of the routers, each with its own tag.

    Args:
        weights: router weights or mean weights of all layers, by name (`routers.Weights`).
        chosen: the layer whose heads or reads are drawn separately.
    """
    layers, kind = router_map(config, weights), architecture_of(config).row_kind
    rows = {
        "routers/layers": (layers, "layer that reads"),
        f"routers/{kind}s_of_layer{chosen}": (head_map(config, weights, chosen), f"{kind} of layer {chosen}"),
    }
    summaries = [
        picture(tag, cells.tolist(), reader, has_mean_map(config), architecture_of(config).first_column)
        for tag, (cells, reader) in rows.items()
    ]
    for layer, (own_share, spread) in enumerate(zip(self_retrieval(layers), entropy(layers), strict=True)):
        summaries += [scalar(f"self_retrieval/layer{layer}", own_share), scalar(f"entropy/layer{layer}", spread)]
        of_layer = [weight for name, weight in weights.items() if name.startswith(f"model.layers.{layer}.")]
        if of_layer:
            values = torch.cat([weight.flatten() for weight in of_layer]).double().numpy()
            summaries.append(histogram(f"router_weights/layer{layer}", values, bins="auto", max_bins=64))
    return summaries


def picture(
    tag: str, cells: Sequence[Sequence[float]], reader: str, of_means: bool = False, first_column: int = 0
) -> Summary:
    """A map as an image, with axes and a scale: rows are the readers, columns what they read; dark cells are read most.

    Args:
        reader: what a row is.
        of_means: whether weights depend on the token, so that the cells are means over tokens.
        first_column: see `Architecture.first_column`.
    """
    read = "layer that is read" + " (-1: embedding)" * (first_column < 0)
    drawn = map_image(cells, read, reader, "mean weight" if of_means else "mean |weight|", first_column)
    image = Summary.Image(height=drawn.height, width=drawn.width, colorspace=3, encoded_image_string=encoded(drawn))
    of_router = "the mean |weight| of its router over the heads that it reads"
    meaning = "how much each row reads of the layers so far: " + (
        "the mean weight over tokens of validation samples" if of_means else of_router
    )
    return Summary(value=[Summary.Value(tag=tag, image=image, metadata=SummaryMetadata(summary_description=meaning))])
