"""LIMe over keys and values: a layer's own are mixed with those of earlier layers, head by head, before rotation."""
