"""From text to token shards: gather documents, train or import a tokenizer, pretokenize, inspect and merge."""

TOOL_VERSION = "0.2.0"  # recorded in every dataset.json; raise it when the bytes of an output change
