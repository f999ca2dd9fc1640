"""Modelling code for `transformers` that is copied into exports. It imports torch and transformers, never lime_dist."""
