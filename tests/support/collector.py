"""Garbage collections that are quick beside large libraries."""

from __future__ import annotations

import gc
import sys

_modules = 0
"""The number of imported modules when everything was frozen last."""


def freeze_imported() -> None:
    """Keep later collections, and counts of live objects, from going through what was imported before: half a second each."""
    global _modules
    if len(sys.modules) > _modules + 50:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)
