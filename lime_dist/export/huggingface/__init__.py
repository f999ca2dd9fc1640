"""Modelling code for `transformers` that an export carries with it: it imports torch and transformers, never lime_dist."""
