"""Protects the exchange of replicas: pieces of the gradients, slices of each replica, and what they cost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipeline.test_equality import check_equal, settings
from support.workers import WorkerGroup

from lime_dist.config.load import load_config
from lime_dist.pipeline import flat_layout
from lime_dist.pipeline.flat_layout import lay_out
from lime_dist.pipeline.process_groups import ProcessGroups
from lime_dist.train import replicas, stage_optimizer
from lime_dist.train.build import make_stage_optimizer
from lime_dist.train.early_sums import EarlySums

Workers = Callable[[int], WorkerGroup]

IN_PIECES, AS_ON_NCCL = "support.cases.train_in_pieces", "support.cases.train_with_calls_of_nccl"


@pytest.mark.parametrize(
    ("zero_stage", "schedule", "tied", "worker"),
    [
        (0, "1f1b", True, IN_PIECES),
        (0, "zero_bubble", False, IN_PIECES),
        (1, "1f1b", False, IN_PIECES),
        (1, "zero_bubble", True, IN_PIECES),
        (1, "1f1b", True, AS_ON_NCCL),
    ],
)
def test_two_stages_of_two_replicas(workers: Workers, zero_stage: int, schedule: str, tied: bool, worker: str) -> None:
    """In many pieces, which cut parameters between replicas, against one process. Calls and bytes are those of the plan; gloo makes a
    call for each slice."""
    values: dict[str, Any] = settings("lime", 2, tied, "fp64", pipeline_stages=2, zero_stage=zero_stage)
    values["pipeline"] = {"schedule": schedule}
    for result in check_equal(values, workers(4), steps=3, worker=worker):
        planned, calls_a_piece = result["planned"], 2 if zero_stage and worker is IN_PIECES else 1
        assert result["pieces"] > 5 and result["pieces"] / 2 < result["early"] < result["pieces"]
        assert result["exchanged"] == (calls_a_piece * planned.calls, planned.gradient_bytes, planned.weight_bytes)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_loss_that_is_not_finite_is_skipped_by_all(workers: Workers, zero_stage: int) -> None:
    """Also when most of the gradients, which are finite, have been summed before the other replicas learn of it."""
    for result in workers(4).run(
        "support.faults.poisoned_step", zero_stage=zero_stage, schedule="zero_bubble", loss=True
    ):
        assert result == {"applied": [True, False, True], "unchanged": True, "moved": True, "skipped": 1, "updates": 2}


class FakeDist:
    """A rank of three replicas that communicate over NCCL. It notes calls and does nothing."""

    Backend = SimpleNamespace(GLOO="gloo")

    def __init__(self, rank: int) -> None:
        self._rank, self.calls = rank, list[tuple[str, int, int, int, int]]()

    def get_world_size(self, group: Any) -> int:
        return 3

    def get_rank(self, group: Any) -> int:
        return self._rank

    def get_backend(self, group: Any) -> str:
        return "nccl"

    def note(self, name: str) -> Callable[..., Any]:
        def call(output: torch.Tensor, source: torch.Tensor, group: Any, async_op: bool) -> Any:
            assert async_op and output.is_contiguous() and source.is_contiguous()
            places = output.storage_offset(), len(output), source.storage_offset(), len(source)
            self.calls.append((name, *places))
            return SimpleNamespace(wait=lambda: None)

        return call


def test_calls_on_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind a piece, in place: NCCL wants a rank's slice where it lies in the whole. All ranks call in the same order."""
    layout = lay_out(
        {"a": (500,), "b": (400,)}, {"a": "plain", "b": "matrices"}, {"a": (), "b": ()}, 4, 3, piece_elements=300
    )
    flat, orders = torch.zeros(layout.size), []
    for rank in range(3):
        fake = FakeDist(rank)
        monkeypatch.setattr(replicas, "dist", fake)
        monkeypatch.setattr(replicas, "reduce_scatter", lambda fake=fake: fake.note("scatter"))
        monkeypatch.setattr(replicas, "all_gather", lambda fake=fake: fake.note("gather"))
        exchange = replicas.Replicas(object(), layout)  # type: ignore[arg-type]  # the fake knows no groups
        for piece in reversed(layout.pieces):
            exchange.start_sum(flat, piece)
        exchange.finish_sums()
        exchange.gather(flat)
        thirds = [len(piece) // 3 for piece in layout.pieces]
        own = [
            range(piece.start + rank * third, piece.start + (rank + 1) * third)
            for piece, third in zip(layout.pieces, thirds, strict=True)
        ]
        scatters = [
            ("scatter", part.start, len(part), piece.start, len(piece))
            for part, piece in zip(own, layout.pieces, strict=True)
        ]
        gathers = [
            ("gather", piece.start, len(piece), part.start, len(part))
            for part, piece in zip(own, layout.pieces, strict=True)
        ]
        assert fake.calls == [*reversed(scatters), *gathers] and len(scatters) > 2
        orders.append([name for name, *_ in fake.calls])
        assert exchange.stats.calls == len(fake.calls)
        assert exchange.stats.gradient_bytes == exchange.stats.weight_bytes == flat.nbytes
    assert orders[0] == orders[1] == orders[2]


class LateDist(FakeDist):
    """One of three replicas with equal gradients. What a collective writes is there when it has been waited for, not before."""

    under_way = 0

    def late(self, write: Callable[[], Any]) -> Any:
        def wait() -> None:
            self.under_way -= 1
            write()

        self.under_way += 1
        return SimpleNamespace(wait=wait)

    def all_reduce(self, tensor: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        return self.late(lambda: tensor.mul_(3)) if async_op else None

    def reduce_scatter(self, output: torch.Tensor, source: torch.Tensor, group: Any, async_op: bool) -> Any:
        return self.late(lambda: output.mul_(3))

    def all_gather(self, output: torch.Tensor, source: torch.Tensor, group: Any, async_op: bool) -> Any:
        return self.late(lambda: None)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_nothing_is_read_before_its_sum_is_there(
    monkeypatch: pytest.MonkeyPatch, zero_stage: int, precision: str
) -> None:
    """Sums start within the last pass, not in the one before it, and the norm and what follows wait for them. Afterwards the optimizer
    is freed, though its parameters have hooks that call it."""
    fake = LateDist(1)
    for module in (replicas, stage_optimizer):
        monkeypatch.setattr(module, "dist", fake)
    monkeypatch.setattr(replicas, "reduce_scatter", lambda: fake.reduce_scatter)
    monkeypatch.setattr(replicas, "all_gather", lambda: fake.all_gather)
    monkeypatch.setattr(flat_layout, "PIECE_ELEMENTS", 300)
    weights = {
        name: torch.nn.Parameter(torch.ones(20, 20, dtype={"fp64": torch.float64, "bf16": torch.bfloat16}[precision]))
        for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    }
    config = load_config(None, [f"parallel.zero_stage={zero_stage}", f"precision={precision}"])
    optimizer = make_stage_optimizer(config, weights, ProcessGroups(object(), object(), {}, frozenset()))  # type: ignore[arg-type]  # the fake knows no groups
    for _ in range(2):
        sum(weight.sum() for weight in weights.values()).backward()  # type: ignore[union-attr]  # not the int 0
        assert fake.under_way == 0
        optimizer.begin_last_pass()
        sum(weight.sum() for weight in weights.values()).backward()  # type: ignore[union-attr]  # likewise
        assert fake.under_way == len(optimizer._layout.pieces) - 1 > 2
        optimizer.reduce_gradients(torch.zeros(()))
        assert fake.under_way == 0
        for name in weights:
            for part in optimizer._own_gradients(name):
                assert torch.allclose(part, torch.full_like(part, 2))
        optimizer.settle(optimizer.step().tolist())
        assert fake.under_way == 0 and not optimizer.flat_gradients.any()
    reference = weakref.ref(optimizer)
    del optimizer, weights
    gc.collect()
    assert reference() is None


def test_pieces_start_in_one_order() -> None:
    """From the last to the first, whatever becomes final when; the first one only with the rest. Before the last pass nothing starts."""
    groups = {"a": "plain", "b": "matrices", "c": "matrices"}
    layout = lay_out(dict.fromkeys(groups, (400,)), groups, dict.fromkeys(groups, ()), 4, piece_elements=250)  # type: ignore[arg-type]  # groups of the test
    started: list[range] = []
    sums = EarlySums(layout, {"a": 1, "b": 2, "c": 3}, started.append)
    backwards = list(reversed(layout.pieces))
    assert len(backwards) == 5
    for _ in range(2):
        for key in (1, 2, 3):
            sums.finish(key)
        assert started == []
        sums.open()
        sums.finish(2)
        assert started == []
        sums.finish(3)
        assert started == backwards[:3], "the piece that c and b share has started, that of b and a not"
        sums.finish(1)
        assert started == backwards[:4]
        sums.start_rest()
        assert started == backwards
        started.clear()
    assert sums.early == 2 * 4
