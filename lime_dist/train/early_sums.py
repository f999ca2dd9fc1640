"""When the sum of each piece of the gradients starts: as soon as the last passes of a step have left their final values in it.

Pieces start in one order, from the last one to the first, on all replicas: collectives of a group must. Parameters lie in the order in
which backward passes finish them, read from the end (`lime_dist.pipeline.flat_layout`), so that a piece rarely waits for the one behind
it. The first piece never starts early. It holds element 0, in which a loss that is not finite is told to the other replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lime_dist.pipeline.flat_layout import FlatLayout, overlap


class EarlySums:
    """The order of the sums of one stage, step after step.

    Args:
        keys: of each parameter, by exported name.
        start: starts to sum a piece.

    Attributes:
        early: pieces that have started before `start_rest`, over all steps.
    """

    def __init__(self, layout: FlatLayout, keys: Mapping[str, int], start: Callable[[range], None]) -> None:
        self.early = 0
        self._layout, self._start = layout, start
        self._held = [
            frozenset(
                keys[name] for name, place in layout.places.items() if overlap(piece, range(place.begin, place.end))
            )
            for piece in layout.pieces
        ]
        self._left = len(layout.pieces)
        self._unfinished: set[int] | None = None

    def open(self) -> None:
        """The last pass of a step begins: from now on gradients become final."""
        self._unfinished = set().union(*self._held)

    def finish(self, key: int) -> None:
        """The gradient of a parameter is final, if the last pass has begun."""
        if self._unfinished is None:
            return
        self._unfinished.discard(key)
        while self._left > 1 and self._unfinished.isdisjoint(self._held[self._left - 1]):
            self.early += 1
            self._start_next()

    def start_rest(self) -> None:
        """All gradients are final: start all pieces that have not started, and be ready for the next step."""
        while self._left:
            self._start_next()
        self._left, self._unfinished = len(self._layout.pieces), None

    def _start_next(self) -> None:
        self._left -= 1
        self._start(self._layout.pieces[self._left])
