"""Optimizers, one file each; ``optimizer.name`` chooses. Importing this package does not import torch: plans read it too."""
