"""Compares the internals of trained models: ``python -m lime_dist.analysis``."""
