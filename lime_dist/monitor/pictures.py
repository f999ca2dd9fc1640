"""What layers read, for TensorBoard: maps as images, scalars of each layer, histograms of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard.summary import histogram, scalar

from lime_dist.config.schema import ModelConfig
from lime_dist.monitor.charts import coloured, png
from lime_dist.monitor.routers import Weights, entropy, head_map, router_map, self_retrieval

SIDE = 512
"""Approximate length of a picture's longer side in pixels, so that cells are visible."""
MIN_CELL = 4
"""Smallest side of a cell in pixels."""


def router_pictures(config: ModelConfig, weights: Weights, chosen: int) -> list[Summary]:
    """All summaries of the routers, each with its own tag.

    Args:
        weights: router weights of all layers, by exported name.
        chosen: the layer whose heads are drawn separately.
    """
    layers = router_map(config, weights)
    summaries = [
        picture("routers/layers", layers.tolist()),
        picture(f"routers/heads_of_layer{chosen}", head_map(config, weights, chosen).tolist()),
    ]
    for layer, (own_share, spread) in enumerate(zip(self_retrieval(layers), entropy(layers), strict=True)):
        summaries += [scalar(f"self_retrieval/layer{layer}", own_share), scalar(f"entropy/layer{layer}", spread)]
        of_layer = [weight for name, weight in weights.items() if name.startswith(f"model.layers.{layer}.")]
        if of_layer:
            values = torch.cat([weight.flatten() for weight in of_layer]).double().numpy()
            summaries.append(histogram(f"router_weights/layer{layer}", values, bins="auto", max_bins=64))
    return summaries


def picture(tag: str, cells: Sequence[Sequence[float]]) -> Summary:
    """A map as an image: rows are the readers, columns what they read; dark cells are read most. A cell is a square.

    TensorBoard shows the axes and the scale as the picture's description.
    """
    pixels, top = coloured(cells)
    size = max(MIN_CELL, SIDE // max(len(pixels), len(pixels[0])))
    rows = [b"".join(pixel * size for pixel in row) for row in pixels for _ in range(size)]
    image = Summary.Image(height=len(rows), width=len(rows[0]) // 3, colorspace=3, encoded_image_string=png(rows))
    axes = (
        f"rows: {len(pixels)} readers, from 0 at the top; columns: {len(pixels[0])} layers that they read, from 0 on the left; "
        f"colour: mean |weight| from 0 (white) to {top:.3g} and above (dark blue)"
    )
    metadata = SummaryMetadata(summary_description=axes)
    return Summary(value=[Summary.Value(tag=tag, image=image, metadata=metadata)])
