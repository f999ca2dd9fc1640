"""The modules of the kinds of connection."""
