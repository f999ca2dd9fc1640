"""Hugging Face models: export a checkpoint, verify and open an export, start a run from a model."""
