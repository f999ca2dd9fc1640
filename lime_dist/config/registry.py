"""Named implementations of one configuration key, such as ``model.architecture``: where the choices of the key come from."""

from __future__ import annotations

import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator

T = TypeVar("T")
_LOADING = threading.RLock()
"""Held while a registry is loaded, so that no thread sees half of it; the thread that loads may look things up meanwhile."""


class Registry(Mapping[str, T], Generic[T]):
    """The implementations of a key by name, in alphabetical order.

    The modules of ``package`` are imported at the first lookup, and register themselves. So a new implementation is one new
    file in that package. The configuration depends on no implementation: it knows the package by its name alone. Other
    modules must not look anything up while they are imported: of two threads, each could wait for what the other loads.

    Args:
        key: the configuration key whose values are the names.
        package: the package whose modules register implementations.
    """

    def __init__(self, key: str, package: str) -> None:
        self.key, self.package = key, package
        self._entries: dict[str, T] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Register the decorated class or function under ``name``.

        Raises:
            ValueError: the name is taken.
            TypeError: the class lacks a member that its protocol requires.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.key}: {name!r} is registered twice")
            if missing := getattr(entry, "__abstractmethods__", None):
                raise TypeError(f"{self.key}: {name!r} lacks {', '.join(sorted(missing))}")
            self._entries[name] = entry
            return entry

        return add

    def unregister(self, name: str) -> None:
        """Remove an implementation; tests that add one use it."""
        del self._entries[name]

    def _load(self) -> dict[str, T]:
        with _LOADING:
            if not self._is_loaded:
                self._is_loaded = True
                try:
                    package = import_module(self.package)
                    for module in pkgutil.iter_modules(package.__path__):
                        import_module(f"{self.package}.{module.name}")
                except BaseException:
                    self._is_loaded = False
                    raise
        return self._entries

    def __getitem__(self, name: str) -> T:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())


def choice_of(registry: Registry[Any]) -> Any:
    """The type of a configuration value that names an implementation: a string, validated against the registry."""

    def check(name: str) -> str:
        if name not in registry:
            *others, last = map(repr, registry)
            raise ValueError(f"{registry.key}={name!r} must be {', '.join(others)}{' or ' if others else ''}{last}")
        return name

    return Annotated[str, AfterValidator(check), registry]


ARCHITECTURES: Registry[Any] = Registry("model.architecture", "lime_dist.model.architectures")
CONNECTIONS: Registry[Any] = Registry("model.hyper.connection", "lime_dist.model.architectures.hyper.connections")
SCHEDULES: Registry[Any] = Registry("pipeline.schedule", "lime_dist.pipeline.schedules")
OPTIMIZERS: Registry[Any] = Registry("optimizer.name", "lime_dist.train.optimizers")
SINKS: Registry[Any] = Registry("monitor.sinks", "lime_dist.monitor.sinks")
LEARNING_RATES: Registry[Any] = Registry("optimizer.schedule", "lime_dist.train.learning_rates")
