"""The label that does not count, for data and models alike."""

IGNORED_LABEL = -100
"""The default ``ignore_index`` of torch's losses."""
