"""The test bed as fixtures: hosts joined by a fast network, and by a slow one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster.bed import ROOT, Bed, NoNamespaces, bed


def start(stack: ExitStack, folder: Path, rate: str | None = None, delay: float = 0.0) -> Bed:
    """Two hosts; a skip that says why where this machine cannot have them, and a failure where it must (`.ci/run`)."""
    try:
        return stack.enter_context(bed(folder, 2, 1, rate, delay))
    except NoNamespaces as reason:
        if os.environ.get("LIME_TEST_BED") == "required":
            raise
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with ExitStack() as stack:
        yield start(stack, tmp_path_factory.mktemp("bed"))


@pytest.fixture(scope="module")
def slow_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """200 Mbit/s and 20 ms, each way."""
    with ExitStack() as stack:
        yield start(stack, tmp_path_factory.mktemp("slow-bed"), "200mbit", 0.02)


@pytest.fixture(scope="session")
def virtual_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that runs the tests, in the form in which the scripts of launch/ take it for finished."""
    folder = tmp_path_factory.mktemp("venv")
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / name).symlink_to(Path(sys.prefix) / name)
    key = ["bash", "-c", "source launch/common.sh && requirements_key && echo"]
    (folder / "lime_dist.installed").write_text(subprocess.check_output(key, cwd=ROOT, text=True))
    return folder
