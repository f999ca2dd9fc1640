"""Read text from parquet, JSONL and hub datasets, and gather a corpus that needs no download."""
