"""What layers read, for TensorBoard: maps as images, scalars of each layer, histograms of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard.summary import histogram, scalar

from lime_dist.config.schema import ModelConfig
from lime_dist.monitor.map_image import encoded, map_image
from lime_dist.monitor.routers import Weights, entropy, head_map, router_map, self_retrieval


def router_pictures(config: ModelConfig, weights: Weights, chosen: int) -> list[Summary]:
    """All summaries of the routers, each with its own tag.

    Args:
        weights: router weights of all layers, by exported name.
        chosen: the layer whose heads are drawn separately.
    """
    layers = router_map(config, weights)
    summaries = [
        picture("routers/layers", layers.tolist(), "layer that reads"),
        picture(
            f"routers/heads_of_layer{chosen}", head_map(config, weights, chosen).tolist(), f"head of layer {chosen}"
        ),
    ]
    for layer, (own_share, spread) in enumerate(zip(self_retrieval(layers), entropy(layers), strict=True)):
        summaries += [scalar(f"self_retrieval/layer{layer}", own_share), scalar(f"entropy/layer{layer}", spread)]
        of_layer = [weight for name, weight in weights.items() if name.startswith(f"model.layers.{layer}.")]
        if of_layer:
            values = torch.cat([weight.flatten() for weight in of_layer]).double().numpy()
            summaries.append(histogram(f"router_weights/layer{layer}", values, bins="auto", max_bins=64))
    return summaries


def picture(tag: str, cells: Sequence[Sequence[float]], reader: str) -> Summary:
    """A map as an image, with axes and a scale: rows are the readers, columns what they read; dark cells are read most.

    Args:
        reader: what a row is.
    """
    drawn = map_image(cells, "layer that is read", reader, "mean |weight|")
    image = Summary.Image(height=drawn.height, width=drawn.width, colorspace=3, encoded_image_string=encoded(drawn))
    meaning = (
        "how much each row reads of the layers so far: the mean |weight| of its router over the heads that it reads"
    )
    return Summary(value=[Summary.Value(tag=tag, image=image, metadata=SummaryMetadata(summary_description=meaning))])
