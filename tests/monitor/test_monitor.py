"""Tests of monitoring: every tag, read back with TensorBoard's own reader, has the right values."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.folders import records, values
from support.workers import WorkerGroup
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.config.load import make_config
from lime_dist.monitor.pictures import picture, router_pictures
from lime_dist.monitor.tensorboard import COLUMNS
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


def test_the_map_is_drawn_cell_by_cell(events: EventAccumulator, dataset: Path, tmp_path: Path) -> None:
    """Five layers give 5 × 5 squares, and no layer reads a later one. Known weights give a known picture."""
    image = np.asarray(Image.open(io.BytesIO(events.Images("routers/layers")[-1].encoded_image_string)))
    side = image.shape[0] // 5
    assert image.shape == (5 * side, 5 * side, 3) and side >= 4
    cells = image.reshape(5, side, 5, side, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    white = (cells[:, 0, :, 0] == 255).all(-1)
    assert (white == ~np.tri(5, dtype=bool)).all()

    model = make_config(settings(dataset, tmp_path), "a test").model
    weights = {}
    for layer in range(1, 5):  # layer ℓ reads only layer ℓ − 1
        weight = torch.zeros(2, 2 * (layer + 1))
        weight[:, 2 * layer - 2 : 2 * layer] = 0.5
        weights[f"model.layers.{layer}.self_attn.router.weight"] = weight
    made = {summary.value[0].tag: summary.value[0] for summary in router_pictures(model, weights, 2)}
    known = np.asarray(Image.open(io.BytesIO(made["routers/layers"].image.encoded_image_string)))[::side, ::side]
    dark = (known == (8, 48, 107)).all(-1)
    assert {(row, column) for row, column in np.argwhere(dark).tolist()} == {(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)}
    assert (known[~dark] == 255).all()
    assert made["self_retrieval/layer3"].simple_value == 0 and made["entropy/layer0"].simple_value == 0
    told = made["routers/layers"].metadata.summary_description
    assert told.startswith("rows: 5 readers, from 0 at the top; columns: 5 layers") and "to 0.5 and above" in told
    heads = made["routers/heads_of_layer2"].image
    assert (heads.width / heads.height) == pytest.approx(5 / 2, abs=0.1)
    assert picture("wide", [[0.0] * 300]).value[0].image.height == 4, "a cell has a minimum size"


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
