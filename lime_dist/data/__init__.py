"""Token shards on disk, the order of their samples, and the micro-batches that a rank reads."""
