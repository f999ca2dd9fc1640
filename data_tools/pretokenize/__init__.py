"""Encode text into Megatron .bin/.idx shards."""
