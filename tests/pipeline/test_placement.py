"""Protects the placement of stages: which ranks are neighbours, how it is described, and that a lost peer's host is named."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest
from support.workers import WorkerGroup

from lime_dist.pipeline.placement import Placement, crossings, describe_placement, process_grid

TWO_BY_FOUR = ["node1"] * 4 + ["node2"] * 4


def stages_of(stages: int, width: int, topology: str) -> list[int]:
    """The stage of each rank."""
    grid = process_grid(stages, width, topology)
    return [grid.get_coord(rank).pipe for rank in range(stages * width)]


def test_neighbouring_ranks() -> None:
    assert stages_of(4, 2, "stages_together") == [0, 1, 2, 3, 0, 1, 2, 3]
    assert stages_of(4, 2, "replicas_together") == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("stages", "width", "topology", "crossed", "line"),
    [
        (4, 2, "stages_together", 0, "replica 0: stages 0-3 on node1; replica 1: stages 0-3 on node2; 0 of 6"),
        (4, 2, "replicas_together", 2, "replica 0: stages 0-1 on node1, 2-3 on node2; replica 1: stages 0-1 on node1"),
        (8, 1, "stages_together", 1, "stages 0-3 on node1, 4-7 on node2; 1 of 7 boundaries between hosts"),
        (8, 1, "replicas_together", 1, "stages 0-3 on node1, 4-7 on node2; 1 of 7 boundaries between hosts"),
    ],
)
def test_hosts_of_stages(stages: int, width: int, topology: str, crossed: int, line: str) -> None:
    grid = process_grid(stages, width, topology)
    assert crossings(grid, TWO_BY_FOUR) == crossed
    assert describe_placement(grid, TWO_BY_FOUR).startswith(line)


def test_many_replicas_are_one_line() -> None:
    hosts = [f"node{rank // 8}" for rank in range(512)]
    line = describe_placement(process_grid(8, 64, "stages_together"), hosts)
    assert line.endswith("replica 7: stages 0-7 on node7 and 56 more replicas; 0 of 448 boundaries between hosts")


def test_hosts_are_named_if_there_are_several() -> None:
    several = Placement(["a", "a", "b", "c"], {"10.0.0.2": "b", "fe80::1": "c"})
    assert several.name(2) == "rank 2 on b" and several.company([0, 1, 2, 3], own=1) == ", with b, c"
    assert several.company([0, 1], own=0) == several.company((), own=0) == ""
    said = "Connection closed by peer [10.0.0.2]:4242, read from [::ffff:10.0.0.2] and [fe80::1]:1, not [10.0.0.9]:1"
    explained = several.explain(f"[pair.cc:547] {said}")
    assert explained == (
        "[pair.cc:547] Connection closed by peer [10.0.0.2]:4242 (b), read from [::ffff:10.0.0.2] (b) and [fe80::1]:1 (c), "
        "not [10.0.0.9]:1"
    )
    alone = Placement(["a", "a"], {"10.0.0.2": "a"})
    assert (
        alone.name(1) == "rank 1"
        and alone.company([0, 1], own=0) == ""
        and alone.explain("[10.0.0.2]:1") == "[10.0.0.2]:1"
    )


def test_who_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of this host that has ended; on other hosts, whoever is at the address; else the partners of the operation."""
    monkeypatch.setattr("lime_dist.pipeline.placement.EXIT_SECONDS", 0.1)
    said = (
        "[enforce fail at ../gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]:3974: Connection reset by peer. This is "
        "typically caused by a remote worker hanging. GLHF"
    )
    running = os.getpid()
    several = Placement(["a", "a", "b"], {"10.0.0.2": "b", "10.0.0.1": "a"}, [running] * 3)
    line = several.lost(said, None, own=0)
    assert line.startswith(
        "the connection to rank 2 on b broke: the other end is gone, or cannot be reached (Read error [10.0.0.2]"
    )
    assert "GLHF" not in line and "gloo" not in line and line.endswith("Connection reset by peer)")
    assert several.lost("Connection closed", [0, 1], own=0).startswith("the connection to rank 1 on a broke: ")
    assert several.lost("Connection closed", (), own=0).startswith("the connection to rank 1 on a, rank 2 on b broke: ")
    with subprocess.Popen(["sleep", "60"]) as victim:
        alone = Placement(["a"] * 3, {}, [running, victim.pid, running])
        assert alone.lost(said, (), own=0).startswith("the connection to rank 1, rank 2 broke")
        victim.kill()  # it stays until it is reaped
        assert alone.lost(said, (), own=0) == alone.lost(said, [0, 2], own=2)
        assert alone.lost(said, (), own=0).startswith("rank 1 is gone: killed, ")
    assert alone.lost(said, None, own=2).startswith("rank 1 is gone: killed, ")


@pytest.mark.parametrize(
    ("boundary", "tied", "named"),
    [
        ("entries", True, [", with c", "", ", with a"]),
        ("entries", False, ["", "", ""]),
        ("minimal", False, [", with b, c", ", with a, c", ", with a, b"]),
    ],
)
def test_the_hosts_that_share_a_gradient_are_named(
    workers: Callable[[int], WorkerGroup], boundary: str, tied: bool, named: list[str]
) -> None:
    """That of a tied weight is summed over the first and the last stage, that of copied routers over all: they wait for each other."""
    group = workers(3)
    assert group.run("support.faults.whom_gradients_need", tie_word_embeddings=tied, boundary=boundary) == named
