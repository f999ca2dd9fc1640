"""Worker cases that run the whole trainer as pretrain.py does, some of them with faults."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pretrain
from lime_dist.config.load import make_config
from lime_dist.errors import LimeError
from lime_dist.train.steps import Steps

Event = dict[str, Any]


def run(values: dict[str, Any], profile: str | None = None) -> str:
    """Train; return the error line of a user's mistake, empty on success."""
    steps = None if profile is None else Steps.parse(profile)
    try:
        pretrain.train(make_config(values, "a test"), verbose=False, profiled=steps)
    except LimeError as error:
        return str(error)
    return ""


def run_in(environment: dict[str, str], values: dict[str, Any]) -> str:
    """`run`, with more variables of the environment."""
    from unittest import mock

    with mock.patch.dict(os.environ, environment):
        return run(values)


def observe_with_a_slow_rank(values: dict[str, Any], slow: int, seconds: float) -> tuple[str, str]:
    """`observe`, with forward passes on one rank that take ``seconds`` longer."""
    import torch.distributed as dist

    from lime_dist.pipeline.module import LimePipelineModule

    forward = LimePipelineModule.forward

    def slowed(*arguments: Any) -> Any:
        if dist.get_rank() == slow:
            time.sleep(seconds)
        return forward(*arguments)

    LimePipelineModule.forward = slowed
    try:
        return observe(values)
    finally:
        LimePipelineModule.forward = forward


def watched(values: dict[str, Any]) -> list[str]:
    """Train; return the pieces of work that this rank watched."""
    from unittest import mock

    from lime_dist.pipeline.engine import LimeEngine

    places: list[str] = []
    watching = LimeEngine.watching

    def noted(engine: Any, work: str, *arguments: Any, **options: Any) -> Any:
        places.append(work)
        return watching(engine, work, *arguments, **options)

    with mock.patch.object(LimeEngine, "watching", noted):
        assert observe(values)[0] == ""
    return places


def run_with_a_broken_dashboard(values: dict[str, Any]) -> tuple[str, str]:
    """`observe`, with a dashboard that refuses everything."""
    from lime_dist.config.registry import SINKS

    class Broken:
        required = waiting = False
        path, note = Path("dashboard"), "a dashboard"

        def __init__(self, *_: Any) -> None:
            pass

        def write(self, *_: Any) -> None:
            raise OSError("refused")

        draw = rewind = write

        def flush(self) -> None:
            pass

        close = flush

    SINKS.register("broken")(Broken)
    try:
        return observe({**values, "monitor": {"sinks": ["broken"]}})
    finally:
        SINKS.unregister("broken")


def observe(
    values: dict[str, Any],
    events: list[Event] | None = None,
    per_rank: dict[int, dict[str, Any]] | None = None,
    profile: str | None = None,
) -> tuple[str, str]:
    """Train with faults; return the error line and the output.

    Args:
        events: each has ``do`` (see `_ACTIONS` and `_AROUND_WRITES`), the ``step`` in which it happens, the ``rank`` on which
            it happens (None: all), and ``once`` if it does not happen again when the step is repeated.
        per_rank: sections of the configuration that differ on a rank.
        profile: the value of ``--profile``.
    """
    import torch.distributed as dist

    from lime_dist.checkpoint import saver
    from lime_dist.pipeline.engine import LimeEngine

    rank = dist.get_rank()
    values = copy.deepcopy(values)
    for section, keys in (per_rank or {}).get(rank, {}).items():
        values[section] |= keys
    own = [event for event in events or [] if event.get("rank") in (None, rank)]
    train_step, write_file = LimeEngine.train_step, saver.write_tensors

    def disturbed_step(engine: Any, *arguments: Any) -> float:
        with contextlib.ExitStack() as stack:
            for event in own:
                if event["step"] == engine.global_steps + 1 and event["do"] in _ACTIONS and not event.get("done"):
                    event["done"] = event.get("once")
                    stack.enter_context(_ACTIONS[event["do"]](engine, event))
            return train_step(engine, *arguments)

    def disturbed_write(folder: Path, *arguments: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for event in own:
                if folder.name == f".global_step{event['step']}.partial" and event["do"] in _AROUND_WRITES:
                    stack.enter_context(_AROUND_WRITES[event["do"]](event))
            return write_file(folder, *arguments)

    said = io.StringIO()
    LimeEngine.train_step, saver.write_tensors = disturbed_step, disturbed_write
    try:
        with contextlib.redirect_stdout(said):
            return run(values, profile), said.getvalue()
    finally:
        LimeEngine.train_step, saver.write_tensors = train_step, write_file


# -- in a step ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signal(engine: Any, event: Event) -> Iterator[None]:
    os.kill(os.getpid(), event.get("signal", signal.SIGTERM))
    yield


@contextlib.contextmanager
def _loss(engine: Any, event: Event) -> Iterator[None]:
    """Change the loss of one micro-batch (``micro_batch``; None: all): ``add`` to it, or with ``poison`` make the loss and its
    gradient nan."""
    original = engine.module.loss_fn

    def changed(logits: Any, labels: Any, share: float | None) -> Any:
        loss = original(logits, labels, share)
        if event.get("micro_batch") not in (None, len(engine.fwd_outputs)):
            return loss
        return loss * math.nan if event.get("poison") else loss + event["add"]

    engine.module.loss_fn = changed
    yield
    engine.module.loss_fn = original


@contextlib.contextmanager
def _gradient(engine: Any, event: Event) -> Iterator[None]:
    """Make an element of the gradient of one parameter (``of``) infinite, before replicas exchange gradients."""
    optimizer = engine.optimizer
    begin = optimizer.begin_last_pass

    def changed() -> None:
        optimizer.gradient(event["of"]).view(-1)[0] = math.inf
        begin()

    optimizer.begin_last_pass = changed
    yield
    optimizer.begin_last_pass = begin


@contextlib.contextmanager
def _file(engine: Any, event: Event) -> Iterator[None]:
    """Write a file of ``size`` bytes, or as much as fits; 0: remove it."""
    path, size = Path(event["path"]), event["size"]
    path.unlink(missing_ok=True)
    if size:
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            for _ in range(size // 512):
                file.write(bytes(512))
    yield


_ACTIONS: dict[str, Callable[[Any, Event], contextlib.AbstractContextManager[None]]] = {
    "signal": _signal,
    "loss": _loss,
    "gradient": _gradient,
    "file": _file,
}


# -- while a rank writes its file of a checkpoint ----------------------------------------------------------------------------


@contextlib.contextmanager
def _no_room(event: Event) -> Iterator[None]:
    """Limit files to 1,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _signal_meanwhile(event: Event) -> Iterator[None]:
    os.kill(os.getpid(), signal.SIGTERM)
    yield


@contextlib.contextmanager
def _slow(event: Event) -> Iterator[None]:
    time.sleep(event["seconds"])
    yield


_AROUND_WRITES: dict[str, Callable[[Event], contextlib.AbstractContextManager[None]]] = {
    "no room": _no_room,
    "signal while saving": _signal_meanwhile,
    "slow disk": _slow,
}
