"""What trained models do inside, side by side: ``python -m lime_dist.analysis``."""
