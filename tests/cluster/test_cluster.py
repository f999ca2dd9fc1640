"""Protects runs over several hosts: the real launcher over ssh, one network namespace per host (`bed.py`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cluster.bed import ROOT, Bed
from support.workers import WorkerGroup

from lime_dist.config.load import make_config
from lime_dist.monitor.metrics import without_clock
from lime_dist.pipeline.boundaries import describe_boundaries
from lime_dist.plan.stage_times import boundary_bytes

pytestmark = pytest.mark.slow
Workers = Callable[[int], WorkerGroup]
TIMEOUT = 6.0


def values(dataset: Path, directory: Path, steps: int, **train: int) -> dict[str, Any]:
    batch = {"global_batch_size": 8, "micro_batch_size": 1, "checkpoint_interval": 5, "evaluation_samples": 4}
    return {
        "run": {"directory": str(directory)},
        "model": {
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "data": {"path": str(dataset), "sequence_length": 16},
        "train": {"steps": steps, "evaluation_interval": 0, **batch, **train},
        "optimizer": {"warmup_steps": 3},
        "parallel": {"pipeline_stages": 2},
        "pipeline": {"timeout": TIMEOUT},
    }  # fmt: skip


def numbers(directory: Path) -> list[dict[str, float]]:
    """Records of a run without the fields that depend on the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


def on_one_host(workers: Workers, processes: int, settings: dict[str, Any], directory: Path) -> list[dict[str, float]]:
    changed = {**settings, "run": {"directory": str(directory)}}
    assert set(workers(processes).run("support.runs.run", values=changed)) == {""}
    return numbers(directory)


def write(settings: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


@contextmanager
def running(cluster: Bed, virtual_environment: Path, config: Path) -> Iterator[Any]:
    """Run `launch/multinode.sh` on the first host."""
    script = ["bash", str(ROOT / "launch/multinode.sh"), str(cluster.hostfile), str(config)]
    more = {
        "LIME_VENV": str(virtual_environment), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0", "PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=1",
    }  # fmt: skip
    process = cluster.start(*script, directory=str(ROOT), **more)
    try:
        yield process
    finally:
        for host in range(len(cluster.hosts)):
            cluster.kill_everything(host)
        process.kill()
        process.communicate()


def wait_for_lines(process: Any, metrics: Path, count: int) -> None:
    begin = time.monotonic()
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() - begin < 90
        time.sleep(0.02)


def test_a_bed_ends_with_the_process_that_made_it(cluster: Bed) -> None:
    """``kill -9`` of the process that made the hosts ends them and everything that runs on them."""
    del cluster  # requested only to skip where hosts are impossible
    mark = "86399"  # a duration that identifies the process
    command = [sys.executable, str(ROOT / "tests/cluster/bed.py"), "--delay", "0.001", "sleep", mark]

    def sleepers() -> list[str]:
        return subprocess.run(
            ["pgrep", "-f", f"^sleep {mark}$"], capture_output=True, text=True, check=False
        ).stdout.split()

    with subprocess.Popen(command) as process:
        begin = time.monotonic()
        while not sleepers():
            assert process.poll() is None and time.monotonic() - begin < 60
            time.sleep(0.1)
        made = psutil.Process(process.pid).children(recursive=True)
        assert len(made) > 6
        process.kill()
    _, left = psutil.wait_procs(made, timeout=10)
    assert not left and not sleepers()


def test_a_slow_link_between_two_stages_changes_no_bit_and_no_byte(
    slow_cluster: Bed, workers: Workers, dataset: Path, tmp_path: Path
) -> None:
    """Two hosts under `deepspeed --hostfile`, with 200 Mbit/s and 20 ms between them, give every record of a run on one host, bit
    for bit. The boundary bytes are as predicted, both as the run counts them and as the network interface does."""
    settings = values(dataset, tmp_path / "run", 8, global_batch_size=64, micro_batch_size=4)
    settings["data"]["sequence_length"] = 64
    config = write(settings, tmp_path / "run.yaml")
    (tmp_path / "variables").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    launcher = ["deepspeed", "--hostfile", str(slow_cluster.hostfile), "pretrain.py", "--config", str(config)]
    with slow_cluster.start(*launcher, directory=str(ROOT), DS_ENV_FILE=str(tmp_path / "variables")) as process:
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "stages 0 on host-a, 1 on host-b; 1 of 1 boundaries between hosts" in said
    assert numbers(tmp_path / "run") == on_one_host(workers, 2, settings, tmp_path / "one-host")

    (payload,) = boundary_bytes(make_config(settings, "a test"))
    back = 8 * 16 * payload
    there = back + payload  # one micro-batch of evaluation
    (line,) = describe_boundaries(make_config(settings, "a test"))
    assert said.count(line) == 2, "at the start and at the end"
    assert f"{line}; {there / 1e6:,.1f} MB there, {back / 1e6:,.1f} MB back" in said
    (link,) = json.loads(slow_cluster.hosts[0].run("ip", "-json", "-statistics", "link", "show", "eth0"))
    for counted, predicted in ((link["stats64"]["tx"], there), (link["stats64"]["rx"], back)):
        assert predicted < counted["bytes"] < 1.2 * predicted  # headers, and bytes of the launcher and ssh
    seconds = [json.loads(line).get("step_seconds", 9) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert min(seconds) > 16 * payload * 8 / 200e6, "a step takes at least as long as its payloads need on the link"


def test_two_replicas_of_two_stages_with_zero(
    cluster: Bed, virtual_environment: Path, workers: Workers, dataset: Path, tmp_path: Path
) -> None:
    """Two hosts, four ranks, one replica per host: equal to one process on the joined batch."""
    settings = values(dataset, tmp_path / "run", 12)
    settings["parallel"] = {"pipeline_stages": 2, "zero_stage": 1}
    hostfile = cluster.hostfile.read_text()
    cluster.hostfile.write_text(hostfile.replace("slots=1", "slots=2"))
    try:
        with running(cluster, virtual_environment, write(settings, tmp_path / "run.yaml")) as process:
            said = process.communicate(timeout=120)[0]
    finally:
        cluster.hostfile.write_text(hostfile)
    assert process.returncode == 0, said
    assert "replica 0: stages 0-1 on host-a; replica 1: stages 0-1 on host-b; 0 of 2 boundaries between hosts" in said
    settings["parallel"] = {}
    for actual, expected in zip(
        numbers(tmp_path / "run"), on_one_host(workers, 1, settings, tmp_path / "one"), strict=True
    ):
        assert actual == pytest.approx(expected, rel=1e-4)


def test_a_lost_host_ends_the_job_and_the_run_resumes(
    cluster: Bed, virtual_environment: Path, workers: Workers, dataset: Path, tmp_path: Path
) -> None:
    """The first start ends when a host's processes are killed, the second when its link goes down, the third by a signal to the
    script. Each time all processes on both hosts end in time and name the host. The run ends as if it had not been disturbed."""
    directory = tmp_path / "run"
    settings = values(dataset, directory, 100)
    config, metrics = write(settings, tmp_path / "run.yaml"), directory / "metrics.jsonl"

    def ended(process: Any) -> str:
        """Wait until the job has ended on both hosts; returns the output of the script."""
        begin = time.monotonic()
        while any(left := [cluster.processes(0), cluster.processes(1)]):
            assert time.monotonic() - begin < TIMEOUT + 10, left
            time.sleep(0.1)
        said: str = process.communicate(timeout=5)[0]
        assert process.returncode not in (0, None), said
        return said

    with running(cluster, virtual_environment, config) as process:
        wait_for_lines(process, metrics, 12)
        cluster.kill_everything(1)
        said = ended(process)
    assert re.search(r"host-a: error: stage 0 \(rank 0 on host-a\), .*\b(rank 1 on|with) host-b", said), said

    with running(cluster, virtual_environment, config) as process:
        wait_for_lines(process, metrics, 26)
        cluster.set_link(1, "down")
        try:
            said = ended(process)
        finally:
            cluster.set_link(1, "up")
    assert re.search(r"resumed from step (10|15) ", said), said
    named = r"host-a: error: stage 0 \(rank 0 on host-a\), .*\b(rank 1 on|with) host-b.*: no progress for 6 s"
    assert re.search(named, said), said

    with running(cluster, virtual_environment, config) as process:
        wait_for_lines(process, metrics, 40)
        (script,) = (n for n, line in cluster.processes(0).items() if line.startswith("bash ") and "multinode" in line)
        os.kill(script, signal.SIGTERM)
        said = ended(process)
    assert process.returncode == 143, said

    with running(cluster, virtual_environment, config) as process:
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and re.search(r"resumed from step [3-9]\d ", said), said
    assert numbers(directory) == on_one_host(workers, 2, settings, tmp_path / "undisturbed")


def examine(cluster: Bed, config: Path, *overrides: str, **more: str) -> tuple[int, list[str]]:
    """Run the doctor on the first host; returns its exit status and lines."""
    command = ["python", "-m", "lime_dist.doctor", "--config", str(config), "--hostfile", str(cluster.hostfile)]
    with cluster.start(*command, *overrides, directory=str(ROOT), DS_ACCELERATOR="cpu", **more) as process:
        said = process.communicate(timeout=120)[0]
    return process.returncode, said.splitlines()


def test_the_doctor_measures_links_and_finds_no_problem(slow_cluster: Bed, dataset: Path, tmp_path: Path) -> None:
    config = write(values(dataset, tmp_path / "run", 10), tmp_path / "run.yaml")
    (slow_cluster.folder / ".deepspeed_env").write_text(
        "DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n"
    )
    begin = time.monotonic()
    try:
        status, lines = examine(slow_cluster, config)
    finally:
        (slow_cluster.folder / ".deepspeed_env").unlink()
    assert time.monotonic() - begin < 60
    assert status == 0 and all(line.startswith("ok: ") for line in lines), lines
    assert any("stages 0 on host-a, 1 on host-b; 1 of 1 boundaries between hosts" in line for line in lines)
    measured = [re.search(r"ok: host-. to host-.: ([\d.]+) MB/s, latency ([\d.]+) ms", line) for line in lines]
    bandwidths = [(float(match[1]), float(match[2])) for match in measured if match]
    assert len(bandwidths) == 2
    for megabytes, milliseconds in bandwidths:
        assert 10 < megabytes < 25.5 and 20 < milliseconds < 40, "200 Mbit/s, 20 ms"


def test_the_doctor_finds_the_problems_of_a_host(cluster: Bed, dataset: Path, tmp_path: Path) -> None:
    """One of two hosts has another configuration file, a missing shard, a broken DeepSpeed, and a small disk of its own; on both,
    the interface does not exist."""
    config = write(values(dataset, tmp_path / "run", 10), tmp_path / "run.yaml")
    host_b = tmp_path / "host-b"
    shutil.copytree(dataset, host_b / "shards")
    (missing,) = (host_b / "shards").glob("train-*.bin")
    missing.unlink()
    write(values(dataset, tmp_path / "run", 11), host_b / "run.yaml")
    package = host_b / "packages/deepspeed-0.19.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.1\n")
    for folder in ("packages", "run"):
        (tmp_path / folder).mkdir()
    b = cluster.hosts[1]
    for here, there in (("shards", dataset), ("run.yaml", config), ("packages", tmp_path / "packages")):
        b.run("mount", "--bind", str(host_b / here), str(there))
    b.run("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path / "run"))
    try:
        path = f"{tmp_path / 'packages'}:{ROOT}"
        status, lines = examine(cluster, config, GLOO_SOCKET_IFNAME="ib0", PYTHONPATH=path)
    finally:
        for mounted in (tmp_path / "run", tmp_path / "packages", config, dataset):
            b.run("umount", str(mounted))
    assert status == 2
    for expected in (
        r"warning: DS_ACCELERATOR, GLOO_SOCKET_IFNAME.*: set here, but `deepspeed` does not forward them to the hosts",
        r"error: deepspeed differs: .* on host-a; 0\.19\.1 on host-b",
        r"error: deepspeed 0\.19\.1 on host-b: 0\.18\.3 to 0\.19\.2 scale gradients wrongly",
        r"ok: the same source files",
        r"error: the configuration differs: \w+ on host-a; \w+ on host-b",
        r"error: host-b: .*/train-.*\.bin: missing, though dataset\.json lists it",
        r"error: host-b: [\d.]+ MB free for run\.directory, two checkpoints need",
        r"error: host-b does not see the folder of run\.directory=",
        r"error: host-a: GLOO_SOCKET_IFNAME=ib0 names none of its interfaces that are up \(eth0, lo\); set .*=eth0",
        r"error: host-b: GLOO_SOCKET_IFNAME=ib0 names none of its interfaces",
        r"warning: links between hosts were not measured",
    ):
        assert any(re.match(expected, line) for line in lines), (expected, lines)
    assert not any(line.startswith("error: host-a: ") and "GLOO" not in line for line in lines), lines
