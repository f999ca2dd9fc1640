"""Looks for what would spoil a long job before it starts: ``python -m lime_dist.doctor``.

`hosts` reaches the machines; on each, `facts` is gathered; `judge` turns the facts of all into findings, and knows nothing
but them; `ring` measures the links between them.
"""
