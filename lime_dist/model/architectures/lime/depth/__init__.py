"""Mixture-of-depths attention (MoDA, arXiv 2603.15619): one softmax over the sequence and over earlier layers at the same token."""
