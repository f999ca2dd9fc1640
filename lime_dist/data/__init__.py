"""Token shards on disk, the order in which their samples come, and the micro-batches that a rank reads."""
