"""TensorBoard's pictures of what layers read: maps as images, figures of each layer, histograms of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import histogram, scalar

from lime_dist.config.schema import ModelConfig
from lime_dist.monitor.charts import coloured, png
from lime_dist.monitor.routers import Weights, entropy, head_map, router_map, self_retrieval

SIDE = 512
"""Pixels that the longer side of a picture has about, so that a cell can be seen."""
LEAST = 4
"""Pixels of a cell's side at least."""


def router_pictures(config: ModelConfig, weights: Weights, chosen: int) -> list[Summary]:
    """All that is drawn of the routers, each under its own tag.

    Args:
        weights: of all layers, by exported name.
        chosen: the layer whose heads are drawn apart.
    """
    layers = router_map(config, weights)
    found = [
        picture("routers/layers", layers.tolist()),
        picture(f"routers/heads_of_layer{chosen}", head_map(config, weights, chosen).tolist()),
    ]
    for layer, (own, wide) in enumerate(zip(self_retrieval(layers), entropy(layers), strict=True)):
        found += [scalar(f"self_retrieval/layer{layer}", own), scalar(f"entropy/layer{layer}", wide)]
        of_layer = [weight for name, weight in weights.items() if name.startswith(f"model.layers.{layer}.")]
        if of_layer:
            values = torch.cat([weight.flatten() for weight in of_layer]).double().numpy()
            found.append(histogram(f"router_weights/layer{layer}", values, bins="auto", max_bins=64))
    return found


def picture(tag: str, cells: Sequence[Sequence[float]]) -> Summary:
    """A map as an image, dark where much is read: row: who reads, column: what is read. A cell is a square of pixels."""
    pixels, _ = coloured(cells)
    size = max(LEAST, SIDE // max(len(pixels), len(pixels[0])))
    rows = [b"".join(pixel * size for pixel in row) for row in pixels for _ in range(size)]
    image = Summary.Image(height=len(rows), width=len(rows[0]) // 3, colorspace=3, encoded_image_string=png(rows))
    return Summary(value=[Summary.Value(tag=tag, image=image)])
