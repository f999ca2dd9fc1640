"""Fixtures of the test bed: hosts on a fast network, and on a slow one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cluster import slurm
from cluster.bed import ROOT, Bed, NoNamespaces, bed


@contextmanager
def needed() -> Iterator[None]:
    """Skip with the reason if this machine cannot have hosts."""
    try:
        yield
    except NoNamespaces as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Two hosts."""
    with ExitStack() as stack:
        with needed():
            cluster = stack.enter_context(bed(tmp_path_factory.mktemp("bed")))
        yield cluster


@pytest.fixture(scope="module")
def slow_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Two hosts with 200 Mbit/s and 20 ms in each direction between them."""
    with ExitStack() as stack:
        with needed():
            cluster = stack.enter_context(bed(tmp_path_factory.mktemp("slow-bed"), rate="200mbit", delay=0.02))
        yield cluster


@pytest.fixture(scope="module")
def queue(cluster: Bed, tmp_path_factory: pytest.TempPathFactory) -> slurm.Slurm:
    """Slurm on the two hosts."""
    with needed():
        return slurm.start(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def virtual_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that runs the tests, in a form that the scripts in launch/ accept as installed."""
    folder = tmp_path_factory.mktemp("venv")
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / name).symlink_to(Path(sys.prefix) / name)
    key = ["bash", "-c", "source launch/common.sh && requirements_key && echo"]
    (folder / "lime_dist.installed").write_text(subprocess.check_output(key, cwd=ROOT, text=True))
    return folder
