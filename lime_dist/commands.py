"""The parser of all commands: an option that takes one value may be given once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class StoreOnce(argparse.Action):
    """Stores the value of an option, and refuses a second one, which argparse would silently prefer."""

    _stored_in: argparse.Namespace | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if option_string is not None and self._stored_in is namespace:
            raise argparse.ArgumentError(self, "is given twice; give it once")
        self._stored_in = namespace
        setattr(namespace, self.dest, values)


class CommandParser(argparse.ArgumentParser):
    """A parser whose help keeps line breaks and whose options with a value may be given once."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        for action in (None, "store"):
            self.register("action", action, StoreOnce)
