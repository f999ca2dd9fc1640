"""Synthetic tasks: questions with worked solutions for training and testing a model."""
