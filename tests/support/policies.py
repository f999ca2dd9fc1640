"""Every history policy, with sizes for models of a few layers."""

from __future__ import annotations

from typing import Any

POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "first_last": {"policy": "first_last", "first": 2, "last": 1},
    "last alone": {"policy": "first_last", "first": 0, "last": 2},
    "chunked": {"policy": "chunked", "chunk_size": 3, "rank": 1, "first": 2},
    "chunked, two rows": {"policy": "chunked", "chunk_size": 4, "rank": 2, "first": 0},
    "dilated": {"policy": "dilated", "stride": 3, "first": 2, "last": 1},
}
"""By name: `model.lime.history` of a configuration. Add a new policy here, so that every test covers it."""
