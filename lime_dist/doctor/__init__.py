"""Finds problems that would spoil a long job before it starts: ``python -m lime_dist.doctor``.

`hosts` runs this command on each host, which answers with its `facts`. `environment`, `checks` and `network` turn these facts
into `findings`; they look at nothing else. `ring` measures the links between hosts. `diagnosis` does all of it in order.
"""
