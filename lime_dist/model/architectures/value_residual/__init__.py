"""Value residual (ResFormer, arXiv 2410.17897): every layer adds the first layer's values to its own."""

from __future__ import annotations

from lime_dist.config.registry import ARCHITECTURES
from lime_dist.model.architectures.value_residual.architecture import ValueResidual

ARCHITECTURES.register("value_residual")(ValueResidual)
