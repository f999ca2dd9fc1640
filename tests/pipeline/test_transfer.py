"""Protects what a transfer takes of a device: how long the sender of a payload holds it, and how many CTAs NCCL may use."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lime_dist import load_config
from lime_dist.errors import LimeError
from lime_dist.pipeline import transfer
from lime_dist.pipeline.overlap import OverlapEngine
from lime_dist.pipeline.transfer import Sender


class Send:
    """A send that completes when told to."""

    def __init__(self, number: int, log: list[str]) -> None:
        self.number, self.log, self.over = number, log, False

    def wait(self) -> None:
        self.log.append(f"wait {self.number}")

    def is_completed(self) -> bool:
        self.log.append(f"ask {self.number}")
        return self.over


class Link:
    """A sender whose sends are told when they are over. Tensors are known by their number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_queued: bool, window: int) -> None:
        self.log: list[str] = []
        self.sends: list[Send] = []
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.sender = Sender(1, cast(Any, None), is_queued, window=window)
        monkeypatch.setattr(transfer.dist, "isend", self._isend)

    def _isend(self, tensor: torch.Tensor, peer: int, group: object) -> Send:
        self.tensors.append(weakref.ref(tensor))
        self.sends.append(Send(len(self.sends), self.log))
        return self.sends[-1]

    def post(self, count: int = 1) -> None:
        for _ in range(count):
            self.sender.post(torch.zeros(1))

    @property
    def held(self) -> list[int]:
        return [number for number, tensor in enumerate(self.tensors) if tensor() is not None]


def test_nccl_frees_a_tensor_at_the_first_post_after_its_send(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(monkeypatch, is_queued=True, window=4)
    link.post(3)
    assert link.held == [0, 1, 2]
    link.sends[0].over = link.sends[1].over = True
    assert link.held == [0, 1, 2]
    link.post()
    assert link.held == [2, 3]
    assert not any(line.startswith("wait") for line in link.log), "neither the host nor the device waits"


def test_nccl_holds_no_more_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is far ahead of its device waits until the oldest send has completed."""
    link = Link(monkeypatch, is_queued=True, window=2)
    link.post(2)
    naps = 0

    def nap(_: float) -> None:
        nonlocal naps
        naps += 1
        link.sends[0].over = naps == 3

    monkeypatch.setattr(transfer.time, "sleep", nap)
    link.post()
    assert naps == 3 and link.held == [1, 2]


def test_nccl_frees_the_last_tensors_when_the_next_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a step only the device waits for them."""
    link = Link(monkeypatch, is_queued=True, window=4)
    link.post(2)
    link.sender.drain()
    assert link.log[-2:] == ["wait 0", "wait 1"] and link.held == [0, 1]
    link.sends[0].over = link.sends[1].over = True
    link.sender.release()
    assert link.held == []


def test_gloo_waits_for_the_oldest_of_a_full_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that a send has completed only after it was waited for, so it is not asked."""
    link = Link(monkeypatch, is_queued=False, window=2)
    link.post(3)
    assert link.log == ["wait 0"] and link.held == [1, 2]
    link.sender.release()
    assert link.held == [1, 2]
    link.sender.drain()
    assert link.log == ["wait 0", "wait 1", "wait 2"] and link.held == []


class Options:
    """What `torch.distributed.ProcessGroupNCCL.Options` has, which only builds of torch with NCCL offer."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(max_ctas=32, min_ctas=1)


@pytest.mark.parametrize(
    ("backend", "given", "limit"), [("nccl", "4", 4), ("nccl", "16", 16), ("nccl", "null", None), ("gloo", "4", None)]
)
def test_ctas_of_the_groups_of_a_boundary(
    monkeypatch: pytest.MonkeyPatch, backend: str, given: str, limit: int | None
) -> None:
    """Both groups of each replica, each with options of its own; gloo has none."""
    made: list[Options | None] = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda *_: backend)
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(torch.distributed, "new_group", lambda ranks, timeout, pg_options: made.append(pg_options))
    stranger: Any = SimpleNamespace(
        lime_config=load_config(None, [f"pipeline.transfer_ctas={given}"]),
        grid=SimpleNamespace(pipe_groups=[[0, 1, 2], [3, 4, 5]]),
        global_rank=2,
        num_stages=3,
        device=torch.device("cpu"),
    )
    OverlapEngine._connect(stranger, 0)
    assert [options and options.config.max_ctas for options in made] == [limit] * 4
    assert len({id(options) for options in made}) == (4 if limit else 1)
    assert cast(Any, OverlapEngine.transfer_ctas).fget(stranger) == limit


def test_ctas_that_nccl_does_not_know_are_refused() -> None:
    for given in ("0", "65"):
        with pytest.raises(LimeError, match="pipeline.transfer_ctas"):
            load_config(None, [f"pipeline.transfer_ctas={given}"])
