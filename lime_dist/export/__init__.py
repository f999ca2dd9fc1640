"""Hugging Face models: written from checkpoints, verified, opened, and imported as the start of a run."""
