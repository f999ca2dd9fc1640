"""The kinds of connection: one file each, which registers itself."""
