"""Hyper-Connections: n residual streams, which every sub-layer reads and writes with weights of its own."""

from __future__ import annotations

from lime_dist.config.registry import ARCHITECTURES
from lime_dist.model.architectures.hyper.architecture import Hyper

ARCHITECTURES.register("hyper")(Hyper)
