"""Tests of monitoring: every tag, read back with TensorBoard's own reader, has the right values."""

from __future__ import annotations

import io
import itertools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support.folders import records, values
from support.workers import WorkerGroup
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.config.load import make_config
from lime_dist.monitor import map_image
from lime_dist.monitor.pictures import picture, router_pictures
from lime_dist.monitor.run_folder import read_router_weights
from lime_dist.monitor.tensorboard import COLUMNS, as_code
from lime_dist.pipeline.clock import KINDS, Clock
from lime_dist.plan.stage_times import boundary_bytes

Workers = Callable[[int], WorkerGroup]


def settings(dataset: Path, directory: Path) -> dict[str, Any]:
    configuration = values(dataset, directory, steps=8, pipeline_stages=2)
    configuration["train"] |= {"log_interval": 4, "checkpoint_interval": 4, "evaluation_interval": 4}
    configuration["monitor"] = {"router_interval": 4, "router_layer": 3, "peak_flops": 1e9}
    return configuration


@pytest.fixture(scope="module")
def watched(workers: Workers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run."""
    directory = tmp_path_factory.mktemp("watched")
    results = workers(2).run("support.runs.observe", values=settings(dataset, directory))
    assert [error for error, _ in results] == ["", ""]
    return directory, results[0][1]


@pytest.fixture(scope="module")
def events(watched: tuple[Path, str]) -> EventAccumulator:
    return EventAccumulator(str(watched[0] / "tensorboard"), size_guidance={"images": 0}).Reload()


def test_every_tag_has_one_value_per_interval(watched: tuple[Path, str], events: EventAccumulator) -> None:
    every_step = {
        "train/loss", "train/perplexity", "train/learning_rate", "train/router_learning_rate", "train/gradient_norm",
        "speed/tokens_per_second", "speed/step_seconds",
    }  # fmt: skip
    every_interval = {
        "speed/mfu",
        "speed/slowest_rank",
        "speed/slowest_over_median",
        "validation/loss",
        "validation/perplexity",
        "boundary0/bytes_there",
        "boundary0/bytes_back",
    }
    for stage in range(2):
        every_interval |= {
            f"stage{stage}/{name}" for name in ("gradient_norm", "memory_bytes", "bubble", "waiting_seconds")
        }
    for layer in range(5):
        every_interval |= {f"self_retrieval/layer{layer}", f"entropy/layer{layer}"}
    tags = events.Tags()
    assert set(tags["scalars"]) == every_step | every_interval
    assert all([event.step for event in events.Scalars(tag)] == list(range(1, 9)) for tag in every_step)
    assert all([event.step for event in events.Scalars(tag)] == [4, 8] for tag in every_interval)
    assert set(tags["images"]) == {"routers/layers", "routers/heads_of_layer3"}
    assert set(tags["histograms"]) == {f"router_weights/layer{layer}" for layer in range(1, 5)}
    assert all([event.step for event in events.Images(tag)] == [4, 8] for tag in tags["images"])
    assert {"config/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert len(list((watched[0] / "tensorboard").iterdir())) == 1, "only rank 0 writes"


def test_values_are_right(watched: tuple[Path, str], events: EventAccumulator, dataset: Path) -> None:
    def drawn(tag: str) -> float:
        return float(events.Scalars(tag)[-1].value)

    config = make_config(settings(dataset, watched[0]), "a test")
    lines = records(watched[0])
    steps = [line for line in lines if "loss" in line]
    crossing = boundary_bytes(config)[0] * config.train.global_batch_size
    assert drawn("boundary0/bytes_there") == drawn("boundary0/bytes_back") == crossing, (
        "those of a training step, without evaluations"
    )
    norms = [drawn(f"stage{stage}/gradient_norm") for stage in range(2)]
    assert math.hypot(*norms) == pytest.approx(steps[-1]["grad_norm"]) and min(norms) > 0
    assert drawn("train/perplexity") == pytest.approx(math.exp(steps[-1]["loss"]))
    for begin, last in ((0, 4), (4, 8)):
        whole = sum(step["step_seconds"] for step in steps[begin:last])
        split = {kind: steps[last - 1][f"seconds_{kind}"] for kind in KINDS if kind != "validation"}
        within = sum(seconds for kind, seconds in split.items() if kind != "checkpoint")
        assert 0.5 * whole < within <= 1.05 * whole and min(split["computation"], split["waiting"], split["data"]) > 0
    assert steps[3]["seconds_checkpoint"] == 0 < steps[7]["seconds_checkpoint"], (
        "the checkpoint of step 4 was saved after the record of step 4"
    )
    assert [line["seconds_validation"] > 0 for line in lines if "validation_loss" in line] == [True, True]
    for stage in range(2):
        assert 0 < drawn(f"stage{stage}/bubble") < 1 and drawn(f"stage{stage}/waiting_seconds") > 0
        assert 1e7 < drawn(f"stage{stage}/memory_bytes") < 1e11
    assert 0 < drawn("speed/mfu") == pytest.approx(steps[-1]["mfu"])


def test_mfu_is_flops_over_time(watched: tuple[Path, str], dataset: Path) -> None:
    """Computed by hand: 6 FLOPs per token and matrix parameter, plus some for attention and routing."""
    steps = [line for line in records(watched[0]) if "loss" in line]
    seconds = sum(step["step_seconds"] for step in steps[4:8])
    per_token = steps[-1]["mfu"] * 2 * 1e9 * seconds / (4 * 4 * 16)
    matrices = 5 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) + 16 * 320
    assert 1 < per_token / (6 * matrices) < 1.35


def plotted(encoded: bytes, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The colours of the cells of a map, [rows, columns, 3], and the whole picture; every cell must have one colour."""
    image = np.asarray(Image.open(io.BytesIO(encoded)))
    (corner, *_) = np.argwhere((image == map_image.FAINT).all(-1))
    across, down = (
        np.argwhere((line == map_image.FAINT).all(-1)).ravel() for line in (image[corner[0]], image[:, corner[1]])
    )
    width = next(end for end, after in zip(across, across[1:], strict=False) if after != end + 1) - corner[1] - 1
    height, inside = down[-1] - corner[0] - 1, image[corner[0] + 1 :, corner[1] + 1 :]
    cells = inside[:height, :width].reshape(rows, height // rows, columns, width // columns, 3)
    assert (cells == cells[:, :1, :, :1]).all() and height >= map_image.MIN_HEIGHT // 2
    return cells[:, 0, :, 0], image


def test_the_map_is_drawn_cell_by_cell(events: EventAccumulator, dataset: Path, tmp_path: Path) -> None:
    """Five layers give 5 × 5 cells, and no layer reads a later one. Known weights give a known picture."""
    cells, _ = plotted(events.Images("routers/layers")[-1].encoded_image_string, 5, 5)
    assert ((cells == 255).all(-1) == ~np.tri(5, dtype=bool)).all()

    model = make_config(settings(dataset, tmp_path), "a test").model
    weights = {}
    for layer in range(1, 5):  # layer ℓ reads only layer ℓ − 1
        weight = torch.zeros(2, 2 * (layer + 1))
        weight[:, 2 * layer - 2 : 2 * layer] = 0.5
        weights[f"model.layers.{layer}.self_attn.router.weight"] = weight
    made = {summary.value[0].tag: summary.value[0] for summary in router_pictures(model, weights, 2)}
    known, _ = plotted(made["routers/layers"].image.encoded_image_string, 5, 5)
    dark = (known == (8, 48, 107)).all(-1)
    assert {(row, column) for row, column in np.argwhere(dark).tolist()} == {(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)}
    assert (known[~dark] == 255).all()
    assert made["self_retrieval/layer3"].simple_value == 0 and made["entropy/layer0"].simple_value == 0
    plotted(made["routers/heads_of_layer2"].image.encoded_image_string, 2, 5)
    assert picture("wide", [[0.0] * 300], "head").value[0].image.width > 4 * 300, "a cell has a minimum size"


def test_maps_have_labelled_axes_and_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts lie inside the picture and do not touch each other; the scale goes from white to the darkest colour."""
    texts: list[tuple[str, tuple[float, float, float, float]]] = []
    draw_text = ImageDraw.ImageDraw.text

    def noted(self: ImageDraw.ImageDraw, xy: Any, text: str, *arguments: Any, **options: Any) -> None:
        box = {key: options[key] for key in ("anchor", "font") if key in options}
        texts.append((text, self.textbbox(xy, text, **box)))
        draw_text(self, xy, text, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    for cells, rows, columns in (
        (np.tri(64) * 3e-5, ["0", "20", "40", "60"], ["0", "20", "40", "60"]),
        (np.full((4, 16), 0.7), list("0123"), list(map(str, range(16)))),
        (np.zeros((1, 300)), ["0"], ["0", "100", "200"]),
    ):
        texts.clear()
        image = map_image.map_image(cells.tolist(), "read", "reader", "weight")
        written = [text for text, _ in texts]
        for names in (rows, columns):
            assert [written.count(name) >= 1 for name in names] == [True] * len(names), written
        assert {"read", "reader", "weight"} < set(written)
        top = np.abs(cells).max() or 1.0
        assert f"{top:.2g}+" in written and "0" in written
        boxes = [box for text, box in texts if text not in ("reader", "weight")]
        assert all(x >= 0 and y >= 0 and right <= image.width and low <= image.height for x, y, right, low in boxes)
        for (left, up, right, low), (left2, up2, right2, low2) in itertools.combinations(boxes, 2):
            assert right <= left2 or right2 <= left or low <= up2 or low2 <= up, written
        scale = np.asarray(image)[map_image.TOP : -map_image.BOTTOM, -60 - map_image.LINE :]
        assert ((scale == (8, 48, 107)).all(-1)[0]).any() and (scale[-1] == 255).all(-1).any()
    for layers, embedding in ((5, ["-1"]), (300, [])):  # a number before 0 only where there is room
        texts.clear()
        map_image.map_image(np.zeros((2, layers + 1)).tolist(), "read", "reader", "weight", -1)
        numbers_below = [text for text, _ in texts if re.fullmatch(r"-?\d+", text)]
        assert [text for text in numbers_below if text.startswith("-")] == embedding and "300" not in numbers_below


@pytest.mark.parametrize("text", ["plain", "a `name` b", "a ```block``` b", "````"])
def test_sample_texts_are_shown_as_they_are(text: str) -> None:
    """In a fenced block of Markdown, whose fence has at least three marks and more than the text."""
    _, fence, shown, end, _ = as_code(text).split("\n")
    assert shown == text and fence == end and set(fence) == {"`"} and len(fence) >= 3 and fence not in text


def test_settings_and_layout_are_where_tensorboard_looks(events: EventAccumulator) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2

    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["loss", "training", "stages", "boundaries", "layers"]
    grouped = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert {"speed/tokens_per_second", "speed/mfu", "train/gradient_norm"} <= grouped

    scalars = events.Tags()["scalars"]
    for category in layout.category:
        for chart in category.chart:
            assert all(any(re.fullmatch(tag, scalar) for scalar in scalars) for tag in chart.multiline.tag), chart.title
    contents = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(contents["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["model.num_hidden_layers"].number_value == 5
    assert start.hparams["model.architecture"].string_value == "lime"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["validation/loss"]
    columns = [info.name for info in experiment.hparam_infos]
    assert columns == sorted(columns) == list(COLUMNS), "TensorBoard sorts them"
    assert columns[0] == "model.architecture" and {"optimizer.lr", "model.num_hidden_layers"} <= set(columns[:6])
    assert set(columns) < set(start.hparams), "the other settings are recorded too"


def test_the_console_says_where_the_time_went(watched: tuple[Path, str]) -> None:
    directory, said = watched
    (line,) = [line for line in said.splitlines() if "of training:" in line]
    shares = dict(part.strip().split(" ")[:2] for part in line.split("training: ")[1].split(" (")[0].split(","))
    assert list(shares) == [*KINDS, "rest"] and sum(map(float, shares.values())) == pytest.approx(100, abs=0.5)
    assert all(float(share) > 0 for kind, share in shares.items() if kind not in ("transfer", "rest"))
    best = min((line["validation_loss"], line["step"]) for line in records(directory) if "validation_loss" in line)
    assert f"best validation loss {best[0]:.4f} at step {best[1]}" in said
    assert f"run folder: {directory}" in said


def test_a_resumed_run_draws_each_step_once(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """It also remembers the best validation of the first start."""
    first = settings(dataset, tmp_path)
    stop = {"do": "signal", "step": 6, "rank": 1}
    assert {error for error, _ in workers(2).run("support.runs.observe", values=first, events=[stop])} == {""}
    ((_, said), _) = workers(2).run("support.runs.observe", values=first)
    assert "resumed from step 6" in said and "best validation loss" in said
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("stage1/bubble")] == [4, 8]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Images("routers/layers")] == [4, 8]


def test_stages_with_several_parts_draw_the_whole_model(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """The routers of both parts of both stages: the pictures are those of the checkpoint. A stage's bytes are those of both its parts."""
    configuration = settings(dataset, tmp_path)
    configuration["parallel"]["virtual_stages"], configuration["pipeline"] = 2, {"schedule": "interleaved"}
    configuration["train"]["steps"] = 4
    assert {error for error, _ in workers(2).run("support.runs.observe", values=configuration)} == {""}
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    step, model, weights = read_router_weights(tmp_path)
    assert step == 4 and len(weights) == 4
    for summary in router_pictures(model, weights, 3):
        (made,) = summary.value
        if made.HasField("image"):
            assert events.Images(made.tag)[-1].encoded_image_string == made.image.encoded_image_string
        elif made.HasField("simple_value"):
            assert events.Scalars(made.tag)[-1].value == made.simple_value
    first, back, second = (4 * size for size in boundary_bytes(make_config(configuration, "a test")))
    for way in ("there", "back"):
        counted = [events.Scalars(f"boundary{stage}/bytes_{way}")[-1].value for stage in range(2)]
        assert counted == [first + second, back]


def test_the_clock_counts_nested_work_separately() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.measuring("computation"):
        time.sleep(0.02)
        with clock.measuring("waiting"):
            time.sleep(0.04)
        time.sleep(0.02)
    time.sleep(0.03)
    with clock.measuring("validation"), clock.measuring("computation"):
        time.sleep(0.03)
    totals = clock.totals()
    assert clock.totals() == totals, "nothing is counted twice"
    assert 0.04 <= totals["computation"] and 0.04 <= totals["waiting"] and 0.03 <= totals["validation"]
    assert sum(totals.values()) < 0.03 + 0.04 + 0.04 + 0.1
    assert {kind for kind, seconds in totals.items() if seconds} == {"computation", "waiting", "validation"}
