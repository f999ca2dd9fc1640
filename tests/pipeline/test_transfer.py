"""Protects how long the sender of a payload holds it: until its send is over, and no longer than it can know."""

from __future__ import annotations

import weakref
from typing import Any, cast

import pytest
import torch

from lime_dist.pipeline import transfer
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
