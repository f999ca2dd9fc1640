"""lime_dist: a pipeline-parallel trainer for deep decoders with Layer-Integrated Memory (arXiv 2502.09245)."""

from lime_dist.config.load import load_config
from lime_dist.model.decoder import build_decoder

__version__ = "0.1.0"
__all__ = ["build_decoder", "load_config"]
