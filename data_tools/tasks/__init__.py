"""Synthetic tasks: questions with worked solutions to fine-tune and measure a model on."""
