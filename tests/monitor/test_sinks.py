"""Tests of the dashboards of `monitor.sinks`, with the real packages, without a network."""

from __future__ import annotations

import json
import math
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import wandb
from support.folders import records as records_of
from support.folders import values
from support.workers import WorkerGroup
from wandb.proto import wandb_internal_pb2

from lime_dist.config.load import load_config
from lime_dist.errors import LimeError
from lime_dist.monitor.metrics import MetricsFile
from lime_dist.monitor.pictures import picture
from lime_dist.monitor.records import Records
from lime_dist.monitor.sinks.mlflow import MLflow
from lime_dist.monitor.sinks.wandb import WeightsAndBiases

Workers = Callable[[int], WorkerGroup]


def offline(folder: Path) -> dict[str, str]:
    return {
        "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"file://{folder}/mlflow", "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_DIR": "", "WANDB_SILENT": "true",
    }  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in offline(tmp_path).items():
        monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(None)  # what an earlier test has read from the environment
    return f"file://{tmp_path}/mlflow"


def log_records(log: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after a header of 7 bytes: blocks of 32 KiB hold pieces of records, each after
    its checksum, length and kind (1: whole, 2: first, 3: middle, 4: last).
    """
    position, record = 7, b""
    while position + 7 <= len(log):
        if position % 32768 > 32768 - 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", log, position)
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def messages(path: Path) -> list[Any]:
    """All messages of a finished file. A process of the package writes it, which may take a moment longer than ours."""
    for _ in range(200):
        written = [wandb_internal_pb2.Record.FromString(content) for content in log_records(path.read_bytes())]
        if any(message.HasField("exit") for message in written):
            return written
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def sent(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar in the files that ``wandb sync`` would send, by tag; and images by the number of them."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for message in messages(path):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item}
            for tag, value in row.items():
                if tag != "step" and not tag.startswith("_"):
                    curves[tag].append((row["step"], value))
    return curves


def drawn(sink: Any) -> None:
    sink.write({"step": 1, "loss": 2.0, "lr": 0.5, "step_seconds": 0.1})
    sink.write({"step": 2, "loss": float("nan")})
    sink.draw(2, {"stage0/bubble": 0.25}, [picture("routers/layers", [[1.0, 0.0], [0.5, 0.5]], "layer")])
    sink.write_texts(2, {"A list is": "a list"})
    sink.close()


def test_weights_and_biases(server: str, tmp_path: Path) -> None:
    config = load_config(None, ["monitor.project=depth"])
    drawn(WeightsAndBiases(tmp_path, config))
    curves = sent(tmp_path)
    assert curves["train/loss"][0] == (1, 2.0) and curves["train/learning_rate"] == [(1, 0.5)]
    assert curves["train/perplexity"][0] == (1, pytest.approx(math.exp(2)))
    assert curves["stage0/bubble"] == [(2, 0.25)]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/routers/*.png"))) == 1
    (texts,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples*.json")
    assert json.loads(texts.read_text())["data"] == [["A list is", "a list"]]
    again = WeightsAndBiases(tmp_path, config)
    again.write({"step": 3, "loss": 1.5})
    again.close()
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 1, "one run, started twice"


def test_mlflow(server: str, tmp_path: Path) -> None:
    config = load_config(None, ["monitor.project=depth", "optimizer.lr=2e-3"])
    drawn(MLflow(tmp_path, config))
    again = MLflow(tmp_path, config)
    again.write({"step": 3, "loss": 1.5})
    again.close()
    client = mlflow.MlflowClient(server)
    (run,) = client.search_runs([client.get_experiment_by_name("depth").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history if metric.step != 2] == [(1, 2.0), (3, 1.5)]
    assert run.data.params["optimizer.lr"] == "0.002" and run.data.metrics["stage0/bubble"] == 0.25
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/samples/step2.json") == {"A list is": "a list"}
    assert [path for path in client.list_artifacts(run.info.run_id, "images") if path.path.endswith(".png")]


@pytest.mark.parametrize(("name", "sink"), [("wandb", WeightsAndBiases), ("mlflow", MLflow)])
def test_a_missing_package_is_one_line(
    name: str, sink: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LimeError, match=rf"monitor.sinks: {name} cannot be imported .*pip install .*\[{name}\]'$"):
        sink(tmp_path, load_config(None, []))


def test_nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # the package reads the environment once
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(LimeError, match="^monitor.sinks: wandb: [^\n]*WANDB_MODE=offline$"):
        WeightsAndBiases(tmp_path, load_config(None, []))
    wandb.teardown()


def test_a_server_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(None)
    with pytest.raises(LimeError, match="^monitor.sinks: mlflow: [^\n]*MLFLOW_TRACKING_URI$"):
        MLflow(tmp_path, load_config(None, []))


def test_a_dashboard_never_ends_a_training(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = [WeightsAndBiases(tmp_path, load_config(None, [])), MLflow(tmp_path, load_config(None, []))]
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    records = Records([*sinks, metrics])
    with monkeypatch.context() as broken:
        broken.setattr(sinks[0]._run, "log", lambda values: 1 / 0)
        broken.setattr(sinks[1]._client, "log_batch", lambda *a, **b: 1 / 0)
        records.write({"step": 1, "loss": 1.0})
        records.draw(1, {"stage0/bubble": 0.5})
        records.flush()
    assert records.problem == f"{tmp_path / 'wandb'} cannot be written: division by zero" and records.fatal is None
    records.close()
    assert [record["step"] for record in records_of(tmp_path)] == [1]


def test_a_run_whose_dashboard_refuses_everything(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """It goes on, although checkpoint.on_error is ``stop``, and says so once."""
    run = values(dataset, tmp_path / "run", steps=6)
    ((problem, said),) = workers(1).run("support.runs.run_with_a_broken_dashboard", values=run)
    assert problem == "" and said.count("dashboard cannot be written: refused") == 2, (
        "at the first step, and at the end"
    )
    assert "records are written again" not in said
    assert [record["step"] for record in records_of(tmp_path / "run") if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_one_dashboard_twice() -> None:
    with pytest.raises(LimeError, match="monitor.sinks has wandb twice"):
        load_config(None, ["monitor.sinks=[wandb, wandb]"])


@pytest.mark.slow
def test_a_run_of_two_stages(server: str, workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """The dashboards have what ``metrics.jsonl`` has, and a second start continues both runs."""
    for steps in (4, 6):
        run = values(dataset, tmp_path / "run", steps=steps, pipeline_stages=2)
        run["monitor"] = {"sinks": ["wandb", "mlflow"]}
        run["train"]["checkpoint_interval"] = 2
        assert set(workers(2).run("support.runs.run_in", environment=offline(tmp_path), values=run)) == {""}
    losses = [(record["step"], record["loss"]) for record in records_of(tmp_path / "run") if "loss" in record]
    assert sent(tmp_path / "run")["train/loss"] == losses
    client = mlflow.MlflowClient(server)
    history = client.get_metric_history((tmp_path / "run/mlflow-run").read_text().strip(), "train/loss")
    assert [(metric.step, metric.value) for metric in history] == losses
