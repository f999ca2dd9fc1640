"""The test bed as fixtures: hosts joined by a fast network, and by a slow one."""

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
    """A skip that says why where this machine cannot have hosts."""
    try:
        yield
    except NoNamespaces as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Two hosts."""
    with ExitStack() as stack:
        with needed():
            found = stack.enter_context(bed(tmp_path_factory.mktemp("bed")))
        yield found


@pytest.fixture(scope="module")
def slow_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Two hosts, 200 Mbit/s and 20 ms each way between them."""
    with ExitStack() as stack:
        with needed():
            found = stack.enter_context(bed(tmp_path_factory.mktemp("slow-bed"), rate="200mbit", delay=0.02))
        yield found


@pytest.fixture(scope="module")
def queue(cluster: Bed, tmp_path_factory: pytest.TempPathFactory) -> slurm.Slurm:
    """Slurm on the two hosts."""
    with needed():
        return slurm.start(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def virtual_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that runs the tests, in the form in which the scripts of launch/ take it for finished."""
    folder = tmp_path_factory.mktemp("venv")
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / name).symlink_to(Path(sys.prefix) / name)
    key = ["bash", "-c", "source launch/common.sh && requirements_key && echo"]
    (folder / "lime_dist.installed").write_text(subprocess.check_output(key, cwd=ROOT, text=True))
    return folder
