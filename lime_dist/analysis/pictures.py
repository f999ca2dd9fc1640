"""The pictures of an analysis as PNG files, with a line or a panel per model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from lime_dist.analysis.representations import KINDS
from lime_dist.analysis.routes import Routes
from lime_dist.data.files import write_atomic
from lime_dist.errors import LimeError
from lime_dist.monitor.charts import COLOURS
from lime_dist.monitor.routers import shares

DPI = 110
ByLayer = Sequence[tuple[float, float]]
Palette = Mapping[str, str]
"""Colour of each model, the same in all pictures."""


def require_libraries() -> None:
    """Check that matplotlib and scikit-learn are installed, and select the backend.

    Raises:
        LimeError: one of them is missing.
    """
    try:
        for name in ("matplotlib", "sklearn"):
            import_module(name)
    except ImportError as error:
        raise LimeError(f"{error.name} is not installed: pip install -c constraints.txt -e '.[analysis]'") from None
    import matplotlib

    matplotlib.use("Agg")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    pyplot.close(figure)
    write_atomic(path, drawn.getvalue())
    return path


def make_palette(models: Iterable[str]) -> Palette:
    """Assign colours in the order of the models."""
    return {model: COLOURS[index % len(COLOURS)] for index, model in enumerate(models)}


def _by_kind(curves: Mapping[str, Mapping[str, ByLayer]], palette: Palette, label: str) -> tuple[Any, Any]:
    """A panel per kind, a line per model: mean and error against the layer."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(KINDS), figsize=(12, 4.2), sharey=True, layout="constrained")
    for axis, (kind, name) in zip(axes, KINDS.items(), strict=True):
        for model, kinds in curves.items():
            mean, error = np.asarray(kinds[kind]).T
            axis.plot(mean, color=palette[model], marker="o", markersize=3, label=model)
            band = (range(len(mean)), mean - error, mean + error)
            axis.fill_between(*band, color=palette[model], alpha=0.2, linewidth=0)
        axis.set_title(name)
        axis.set_xlabel("layer" if kind == "values" else "before layer; the last point: after the last norm")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    axes[-1].legend()
    return figure, axes


def draw_entropy(path: Path, entropies: Mapping[str, Mapping[str, ByLayer]], palette: Palette) -> Path:
    """``entropies``: by model, by kind, by layer: mean and standard error."""
    figure, _ = _by_kind(entropies, palette, "matrix entropy, nats")
    return _save(figure, path)


def draw_separability(
    path: Path, accuracies: Mapping[str, Mapping[str, ByLayer]], palette: Palette, chance: float
) -> Path:
    """``accuracies``: by model, by kind, by layer: mean and standard deviation; ``chance``: the accuracy of guessing."""
    figure, axes = _by_kind(accuracies, palette, "accuracy of a linear classifier")
    for axis in axes:
        axis.axhline(chance, color="grey", linestyle=":", label="chance")
    axes[0].set_ylim(top=1.02)
    axes[-1].legend()
    return _save(figure, path)


def draw_clouds(
    path: Path,
    clouds: Mapping[str, tuple[Sequence[int], Sequence[np.ndarray]]],
    labels: np.ndarray,
    words: Sequence[str],
) -> Path:
    """A row per model, a column per layer, a colour per word.

    Args:
        clouds: by model: layers, and the points [n, 2] of each.
        labels: [n], the word of each point.
    """
    from matplotlib import pyplot

    columns = max(len(layers) for layers, _ in clouds.values())
    size = (3 * columns, 3 * len(clouds) + 0.5)
    figure, axes = pyplot.subplots(len(clouds), columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for row, (model, (layers, points_by_layer)) in zip(axes, clouds.items(), strict=True):
        for axis, layer, points in zip(row, layers, points_by_layer, strict=False):
            axis.axis("on")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{model}, layer {layer}", fontsize=9)
            for index, word in enumerate(words):
                cloud = points[labels == word]
                axis.scatter(*cloud.T, s=6, alpha=0.7, color=COLOURS[index % len(COLOURS)], label=word)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(words), frameon=False, markerscale=2.5)
    return _save(figure, path)


def draw_maps(path: Path, routes: Mapping[str, Routes]) -> Path:
    """A map per model, each row divided by its sum."""
    from matplotlib import pyplot
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    columns = min(3, len(routes))
    rows = -(-len(routes) // columns)
    size = (4.6 * columns, 4.2 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    norm = PowerNorm(0.5, 0, 1)  # makes small shares visible
    colours = ScalarMappable(norm, "Blues")
    for axis in axes.flat[len(routes) :]:
        axis.axis("off")
    for axis, (model, one) in zip(axes.flat, routes.items(), strict=False):
        rows, columns = one.map.shape  # with one column more than layers, the first one is the embedding, at −1
        extent = (rows - columns - 0.5, rows - 0.5, rows - 0.5, -0.5)
        axis.imshow(colours.to_rgba(shares(one.map).numpy()), interpolation="nearest", extent=extent)
        axis.set_title(model)
        axis.set_xlabel("layer that is read")
        axis.set_ylabel("layer that reads")
    figure.colorbar(colours, ax=axes, label="share of what a layer reads", shrink=0.8)
    return _save(figure, path)


def draw_retrieval(path: Path, routes: Mapping[str, Routes], palette: Palette) -> Path:
    """Three panels against the layer, with a line per model."""
    from matplotlib import pyplot

    panels = {
        "self_retrieval": "share of its own",
        "entropy": "entropy of what is read, nats",
        "distance": "mean distance, layers",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 4), layout="constrained")
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for model, one in routes.items():
            axis.plot(getattr(one, name), color=palette[model], marker="o", markersize=3, label=model)
        axis.set_xlabel("layer that reads")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].legend()
    return _save(figure, path)
