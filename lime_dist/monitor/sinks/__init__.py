"""Dashboards beside TensorBoard and ``metrics.jsonl``, one file each; ``monitor.sinks`` chooses."""
