"""From text to token shards: gather documents, train a tokenizer, pretokenize, look at the result."""

TOOL_VERSION = "0.2.0"  # stands in every dataset.json; raise it when the bytes of an output change
