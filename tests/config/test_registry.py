"""Tests of registries of implementations."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from lime_dist.config.registry import Registry

MODULE = """
import slow_choices

slow_choices.loading.set()
slow_choices.go_on.wait(60)
slow_choices.registry.register("only")(1)
"""


def test_a_second_thread_waits_for_the_first_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread is held within the import of the only implementation while the second asks for it."""
    package = tmp_path / "slow_choices"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import slow_choices  # type: ignore[import-not-found]  # written above

    registry: Registry[int] = Registry("some.key", "slow_choices")
    slow_choices.registry = registry
    slow_choices.loading, slow_choices.go_on = threading.Event(), threading.Event()
    seen: list[list[str]] = []
    threads = [threading.Thread(target=lambda: seen.append(list(registry))) for _ in range(2)]
    try:
        threads[0].start()
        assert slow_choices.loading.wait(60)
        threads[1].start()
        threads[1].join(0.2)
        assert not seen, "nobody sees a registry that is half loaded"
        slow_choices.go_on.set()
        for thread in threads:
            thread.join(60)
        assert seen == [["only"], ["only"]]
    finally:
        slow_choices.go_on.set()
        sys.modules.pop("slow_choices", None)
        sys.modules.pop("slow_choices.one", None)
