"""What the sinks of dashboards share."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lime_dist.errors import LimeError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

FINISH_SECONDS = 120
"""How long the end of a run waits until a dashboard has everything."""


def package(name: str, extra: str) -> Any:
    """An optional package.

    Raises:
        LimeError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise LimeError(
            f"monitor.sinks: {name} cannot be imported ({error}); pip install -c constraints.txt -e '.[{extra}]'"
        ) from None


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what a package raises into the OSError of a sink: a dashboard never ends a training."""
    try:
        yield
    except Exception as error:  # of many types
        raise OSError(first_line(error)) from None


def scalars_in(scalars: Mapping[str, float], pictures: Sequence[Summary]) -> dict[str, float]:
    """All scalars of a drawing, by tag: pictures come with the scalars of single layers."""
    single = {
        value.tag: value.simple_value for one in pictures for value in one.value if value.HasField("simple_value")
    }
    return {**scalars, **single}


def images_in(pictures: Sequence[Summary]) -> Iterator[tuple[str, Image]]:
    """The images of a drawing, by tag."""
    from PIL import Image

    for value in (value for one in pictures for value in one.value if value.HasField("image")):
        yield value.tag, Image.open(io.BytesIO(value.image.encoded_image_string))
