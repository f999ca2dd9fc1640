"""The results for one model, and their form in analysis.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lime_dist.analysis.routes import Route, Routes
from lime_dist.analysis.words import Occurrences


@dataclass(frozen=True)
class Findings:
    """Results for one model; None or empty where they do not apply.

    Attributes:
        entropy: by kind, by layer: mean and standard error over samples, in nats.
        separability: by kind, by layer: mean and standard deviation of the accuracy over folds.
        clouds: layers, and the points [n, 2] of each.
        routes: what layers read.
        dynamic: the routes of a dynamic router that depend most on the token.
    """

    entropy: Mapping[str, Sequence[tuple[float, float]]]
    separability: Mapping[str, Sequence[tuple[float, float]]] | None
    clouds: tuple[Sequence[int], Sequence[np.ndarray]]
    routes: Routes | None
    dynamic: Sequence[Route]


def numbers(findings: Mapping[str, Findings], samples: Sequence[Tensor], words: Occurrences | None) -> dict[str, Any]:
    """The content of analysis.json: what was read, and the results by model."""
    models = {}
    for name, one in findings.items():
        routes = None if one.routes is None else {**vars(one.routes), "map": one.routes.map.tolist()}
        models[name] = {
            "entropy": one.entropy,
            "separability": one.separability,
            "routes": routes,
            "dynamic_routes": [asdict(route) for route in one.dynamic],
        }
    return {
        "samples": len(samples),
        "sequence_length": len(samples[0]),
        "words": None if words is None else {"words": words.words, "occurrences_of_each": words.each},
        "models": models,
    }
