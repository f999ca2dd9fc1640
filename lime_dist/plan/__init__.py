"""What a run will cost: memory, time and bytes per stage, computed from its configuration. Run as ``python -m lime_dist.plan``."""
