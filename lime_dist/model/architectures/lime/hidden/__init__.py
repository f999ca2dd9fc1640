"""LIMe over hidden states: each head's key and value are projected from its own mixture of earlier layers' inputs."""
