"""Tests of what users see: pages of a real TensorBoard server in headless Chromium."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.folders import values
from support.workers import WorkerGroup

pytestmark = pytest.mark.slow
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DARK_BLUE, ORANGE = (8, 48, 107), (255, 112, 67)
"""The colour of a map's darkest cells, and of the first run in TensorBoard's charts."""


@pytest.fixture(scope="module")
def address(
    workers: Callable[[int], WorkerGroup], dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a server that shows a run with two stages."""
    directory = tmp_path_factory.mktemp("shown")
    settings = values(dataset, directory, steps=6, pipeline_stages=2)
    settings["train"]["log_interval"] = settings["train"]["evaluation_interval"] = 2
    settings["monitor"] = {"router_interval": 3}
    assert workers(2).run("support.runs.run", values=settings) == ["", ""]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(directory / "tensorboard"),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server_address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while not _tags(server_address, "scalars"):
            assert server.poll() is None and time.monotonic() < until, "TensorBoard does not answer"
            time.sleep(0.3)
        yield server_address
    finally:
        server.kill()
        server.wait()


def _tags(address: str, plugin: str) -> dict[str, object]:
    try:
        with urllib.request.urlopen(f"{address}/data/plugin/{plugin}/tags", timeout=10) as answer:
            tags: dict[str, object] = json.load(answer).get(".", {})
            return tags
    except OSError:
        return {}


def test_the_server_offers_every_kind(address: str) -> None:
    scalars = _tags(address, "scalars")
    assert {"validation/loss", "stage1/bubble", "boundary0/bytes_there", "entropy/layer4"} <= set(scalars)
    assert set(_tags(address, "images")) == {"routers/layers", "routers/heads_of_layer4"}
    assert "router_weights/layer4" in _tags(address, "histograms")
    request = urllib.request.Request(
        f"{address}/data/plugin/hparams/session_groups",
        data=json.dumps({
            "experimentName": "", "startIndex": 0, "sliceSize": 9,
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
            "colParams": [{"metric": {"tag": "validation/loss", "group": ""}}],
        }).encode(),
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    (session,) = json.load(urllib.request.urlopen(request, timeout=30))["sessionGroups"]
    assert session["hparams"]["model.architecture"] == "lime" and session["metricValues"][0]["value"] > 0


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("tab", "colour", "least"), [("images", DARK_BLUE, 2000), ("custom_scalars", ORANGE, 300)])
def test_a_page_shows_it(address: str, tab: str, colour: tuple[int, int, int], least: int, tmp_path: Path) -> None:
    """The page shows the dark cells of the heat map, and the colour of the curves."""
    picture = tmp_path / f"{tab}.png"
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1600",
        "--virtual-time-budget=25000", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}",
        f"{address}/?darkMode=false#{tab}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert (abs(pixels - colour).max(-1) <= 2).sum() > least
