"""What a run costs: memory, time and bytes per stage, computed from its configuration. Run as ``python -m lime_dist.plan``."""
