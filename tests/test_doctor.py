"""Protects the doctor: each finding from facts alone, and the command on this machine.

`tests/cluster/test_cluster.py` runs it on several hosts.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from support.workers import WorkerGroup

from lime_dist import load_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.doctor import checks, compute, environment, facts, network
from lime_dist.doctor.facts import Facts
from lime_dist.doctor.findings import Finding, Job, size
from lime_dist.doctor.hosts import forwarded_variables, read_hostfile
from lime_dist.doctor.preflight import preflight, why_not_writable
from lime_dist.doctor.ring import Link, bandwidth
from lime_dist.doctor.transferred_bytes import bytes_between_hosts
from lime_dist.errors import LimeError
from lime_dist.model.cost import count_parameters, payload_bytes
from lime_dist.model.parameters import stage_parameters
from lime_dist.pipeline.boundaries import describe_boundaries

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "model.vocab_size=320", "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=4",
    "train.steps=40", "optimizer.warmup_steps=4", "train.checkpoint_interval=10", "parallel.pipeline_stages=2", "data.sequence_length=16",
]  # fmt: skip
GOOD = Facts(
    host="node1",
    clock=0.0,
    versions={"Python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
    code="c0de" * 16,
    config="c0f1" * 16,
    config_problem="",
    data="da7a" * 16,
    data_problems=[],
    shards=3,
    interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]},
    routes={"node2": "10.0.0.1"},
    addresses={"node2": "10.0.0.2"},
    own_address="10.0.0.1",
    first_address="10.0.0.1",
    port_is_free=True,
    variables={},
    sees_probe=True,
    free_disk=10**12,
    free_memory=10**11,
)
OTHER = replace(
    GOOD,
    host="node2",
    interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"]},
    routes={"node1": "10.0.0.2"},
    addresses={"node1": "10.0.0.1"},
    own_address="10.0.0.2",
    first_address="10.0.0.2",
)


def job(*overrides: str, slots: int = 1) -> Job:
    return Job(load_config(None, [*SMALL, *overrides]), {"node1": slots, "node2": slots})


def findings_for(first: Facts = GOOD, second: Facts = OTHER, on: Job | None = None) -> list[Finding]:
    known = [first, second]
    return [*checks.check_hosts(on or job(), known), *network.check_network(known)]


def problems(findings: Sequence[Finding]) -> list[str]:
    """The lines that are not ok."""
    return [str(finding) for finding in findings if finding.level != "ok"]


def test_good_hosts_have_no_problems() -> None:
    assert problems(findings_for()) == [] and len(findings_for()) >= 9
    (line,) = describe_boundaries(job().config)
    assert f"ok: {line}" in map(str, findings_for())


def test_what_stages_would_compute_again() -> None:
    """The host with the least memory for a process decides, here the second."""
    auto = job("parallel.activation_checkpointing=auto")
    chosen = "ok: parallel.activation_checkpointing=auto: {} on stages 0 to 1, for 85% of {} GB a process"
    assert chosen.format("false", "100.0") in map(str, findings_for(on=auto))
    found = list(map(str, findings_for(second=replace(OTHER, free_memory=1000), on=auto)))
    assert chosen.format("true", "0.000") in found and any("node2: needs up to 0." in line for line in found)
    assert not any("activation_checkpointing=auto:" in str(finding) for finding in findings_for())


ONE_CHECKPOINT = 12 * count_parameters(load_config(None, SMALL).model)


@pytest.mark.parametrize(
    ("second", "lines"),
    [
        ({"versions": {**GOOD.versions, "torch": "2.6.0"}}, ["error: torch differs: 2.13.0 on node1; 2.6.0 on node2; install", "error: torch 2.6.0 on node2: lime_dist needs torch>=2.8"]),
        ({"versions": {**GOOD.versions, "deepspeed": "0.19.0"}}, ["error: deepspeed differs", "error: deepspeed 0.19.0 on node2: 0.18.3 to 0.19.2 scale gradients wrongly"]),
        ({"versions": {**GOOD.versions, "deepspeed": "not installed"}}, ["error: deepspeed differs: 0.19.8 on node1; not installed on node2"]),
        ({"code": "0ld0" * 16}, ["error: the program's source files differ: c0dec0dec0de on node1; 0ld00ld00ld0 on node2"]),
        ({"config": "0ther" * 12}, ["error: the configuration differs"]),
        ({"config": "", "config_problem": "unknown key x"}, ["error: node2: unknown key x"]),
        ({"data_problems": ["train-0.bin: missing"] * 5, "data": "da7a" * 16}, ["error: node2: train-0.bin: missing"] * 3 + ["error: node2: 2 more shards"]),
        ({"data": "0ld0" * 16}, ["error: dataset.json differs"]),
        ({"free_disk": 2 * ONE_CHECKPOINT - 1}, [f"error: node2: {size(2 * ONE_CHECKPOINT)} free for run.directory, two checkpoints need {size(2 * ONE_CHECKPOINT)}"]),
        ({"free_disk": 4 * ONE_CHECKPOINT - 1}, [f"warning: node2: {size(4 * ONE_CHECKPOINT)} free for run.directory, 3 checkpoints of {size(ONE_CHECKPOINT)}"]),
        ({"free_disk": 4 * ONE_CHECKPOINT}, []),
        ({"free_memory": 1000}, ["error: node2: needs up to 0."]),
        ({"sees_probe": False}, ["error: node2 does not see the folder of run.directory=runs/default"]),
        ({"refusals": ["model.vocab_size=3 is smaller"]}, ["error: node2: model.vocab_size=3 is smaller"]),
        ({"notes": ["validations have 60 samples"]}, []),
        ({"warnings": ["no validation: too few"]}, ["warning: no validation: too few"]),
        ({"skew": 30.0}, ["warning: node2: its clock is 30 s ahead of node1's"]),
        ({"skew": -3.0}, ["warning: node2: its clock is 3 s behind node1's"]),
        ({"skew": 1.9}, []),
        ({"routes": {"node1": ""}}, ["error: node2 has no route to node1"]),
        ({"own_address": "127.0.1.1"}, ["error: node2: its own name resolves to 127.0.1.1, where gloo would listen, but eth0 leads"]),
        ({"own_address": "127.0.1.1", "variables": {"GLOO_SOCKET_IFNAME": "eth0"}}, []),
        ({"variables": {"GLOO_SOCKET_IFNAME": "ib0"}}, ["error: node2: GLOO_SOCKET_IFNAME=ib0 names none of its interfaces that are up (eth0, lo); set GLOO_SOCKET_IFNAME=eth0"]),
        ({"variables": {"GLOO_SOCKET_IFNAME": "lo"}}, ["error: node2: GLOO_SOCKET_IFNAME=lo selects lo, but the route to the other hosts uses eth0"]),
        ({"gpus": [10**11]}, ["error: node1 would train on CPUs, the others on GPUs"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_host(second: dict[str, Any], lines: list[str]) -> None:
    got = problems(findings_for(second=replace(OTHER, **second)))
    assert len(got) == len(lines), got
    for line, beginning in zip(got, lines, strict=True):
        assert line.startswith(beginning), line


def test_what_is_wrong_with_the_first_host() -> None:
    (line,) = problems(findings_for(replace(GOOD, first_address="192.168.7.1")))
    assert (
        line.startswith("warning: `hostname -I` on node1 begins with 192.168.7.1") and "resolve it to 10.0.0.1" in line
    )
    (line,) = problems(findings_for(replace(GOOD, port_is_free=False)))
    assert line.startswith("error: the master port is in use on node1")
    (line,) = problems(findings_for(replace(GOOD, variables={"GLOO_SOCKET_IFNAME": "ib0"})))
    assert line == (
        "warning: node1: GLOO_SOCKET_IFNAME=ib0 selects ib0, but the route to the other hosts uses eth0; set "
        "GLOO_SOCKET_IFNAME=eth0"
    )
    (line,) = problems(findings_for(replace(GOOD, sees_probe=None)))
    assert line.startswith("warning: run.directory=runs/default cannot be written here")


def test_gpus() -> None:
    """With GPUs, their number and memory count and the host's memory does not; DS_ACCELERATOR=cpu excludes them."""
    good, other = (replace(fact, gpus=[10**11] * 2, free_memory=1000) for fact in (GOOD, OTHER))
    assert problems(findings_for(good, other, job(slots=2))) == []
    wanted = "error: node1: 2 GPUs for 4 processes; lower its slots in the hostfile"
    assert wanted in problems(findings_for(good, other, job(slots=4)))
    (line,) = problems(findings_for(good, replace(other, gpus=[1000, 1000])))
    assert line.startswith("error: node2: needs up to 0.") and "of GPU memory, but only 0.0 MB is available" in line
    assert network.ring_devices([good, other], 2) == ["cuda:0", "cuda:0"]
    assert network.ring_devices([good], 2) == ["cuda:0", "cuda:1"]
    on_cpu = replace(good, variables={"DS_ACCELERATOR": "cpu"})
    assert network.ring_devices([on_cpu], 2) == network.ring_devices([replace(good, gpus=[1])], 2) == ["cpu", "cpu"]
    assert (
        "error: node1: needs up to" in problems(findings_for(on_cpu, other))[-1]
        or "would train on CPUs" in problems(findings_for(on_cpu, other))[-1]
    )


@pytest.mark.parametrize(
    ("told", "chosen"),
    [
        ("eth0", {"eth0"}),
        ("eth", {"eth0", "eth1"}),
        ("=eth0,ib0", {"eth0", "ib0"}),
        ("^eth,lo", {"ib0"}),
        ("en", set()),
    ],
)
def test_how_nccl_reads_its_variable(told: str, chosen: set[str]) -> None:
    assert network.chosen_interfaces(told, ["lo", "eth0", "eth1", "ib0"], prefixes=True) == chosen


def test_what_does_not_divide_or_leaves_stages_waiting() -> None:
    (line,) = problems(findings_for(on=job("parallel.pipeline_stages=3")))
    assert line.startswith("error: parallel.pipeline_stages=3 does not divide the 2 processes")
    (line,) = problems(findings_for(on=job("train.global_batch_size=1", "train.micro_batch_size=1")))
    assert line.startswith("warning: 1 micro-batches for 2 stages")


def test_bytes_between_hosts() -> None:
    """Counted by hand for two hosts of two processes; a finding names the better order of ranks."""
    overrides = [
        "train.global_batch_size=8",
        "train.micro_batch_size=1",
        "model.tie_word_embeddings=false",
        "parallel.stage_layers=[2, 2]",
        "data.sequence_length=4",
    ]
    config = job(*overrides).config
    hosts = ["node1", "node1", "node2", "node2"]
    sizes = [sum(stage_parameters(config.model, layers).values()) for layers in (range(2), range(2, 4))]
    assert sum(sizes) == count_parameters(config.model)
    # Rings of two: each process sends its whole gradient once, over one of the two links between the hosts.
    assert bytes_between_hosts(config, hosts, "stages_together") == 2 * 4 * sum(sizes)
    payload = payload_bytes(config.model, 2, 4, 4)
    assert bytes_between_hosts(config, hosts, "replicas_together") == 2 * 2 * 4 * payload
    (line,) = problems(findings_for(on=job(*overrides, slots=2)))
    assert (
        line.startswith("warning: parallel.topology=stages_together sends 0.2 MB") and "replicas_together would" in line
    )
    assert problems(findings_for(on=job(*overrides, "parallel.topology=replicas_together", slots=2))) == []


def test_a_slow_link_stands_out() -> None:
    fast, slow = Link(1e9, 1e-4), Link(3e8, 1e-4)
    lines = [str(finding) for finding in network.check_links({("a", "b"): fast, ("b", "c"): fast, ("c", "a"): slow})]
    assert lines[:2] == [f"ok: {way}: 1,000.0 MB/s, latency 0.10 ms" for way in ("a to b", "b to c")]
    assert lines[2].startswith("warning: c to a: 300.0 MB/s, latency 0.10 ms; others reach 1,000.0 MB/s")


LINES = {
    "NAME=value": ("ok", "value"),
    "NAME = value": ("ok", "value"),
    "NAME=/a/b:c,d=e": ("ok", "/a/b:c,d=e"),
    "NAME=two words": ("ok", "two words"),
    "": ("error", "traceback"),
    "   ": ("error", "traceback"),
    "# comment": ("error", "traceback"),
    "#NAME=value": ("error", "nothing runs"),
    "NAME": ("error", "traceback"),
    "two names=value": ("error", "None"),
    "export NAME=value": ("warning", "value"),
    'NAME="two words"': ("error", "two"),
    "NAME='value'": ("warning", "'value'"),
    "NAME=$HOME/x": ("warning", "/home/me/x"),
}
"""A line of `.deepspeed_env`, the level of its finding, and the value that NAME gets."""


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_launchers_file(line: str, tmp_path: Path) -> None:
    """The finding agrees with what happens: DeepSpeed's own code builds the command, a shell runs it."""
    level, outcome = LINES[line]
    levels = [finding.level for finding in environment.environment_file("file", f"A=b\n{line}\n")]
    assert levels == [level]
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    try:
        key, value = f"{line}\n".split("=", maxsplit=1)  # as deepspeed/launcher/runner.py reads a line
    except ValueError:
        assert outcome == "traceback"
        return
    runner.add_export(key, value)
    exports = "".join(f"export {key}={value}; " for key, value in runner.exports.items())
    command = f"{exports} {sys.executable} -c 'import os; print(os.environ.get(\"NAME\"))'"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={"HOME": "/home/me"}, check=False
    )
    assert ("nothing runs" if "declare -x" in done.stdout else done.stdout.strip()) == outcome


def test_the_end_of_the_launchers_file() -> None:
    """A last line without a line break, and an empty file, are not blank lines; a blank last line is one."""
    for text, levels in (("A=b", ["ok"]), ("A=b\n", ["ok"]), ("", ["ok"]), ("A=b\n\n", ["error"])):
        assert [finding.level for finding in environment.environment_file("file", text)] == levels


def test_variables_that_are_not_forwarded(tmp_path: Path) -> None:
    here = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/x", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "2", "LANG": "C"}
    forwarded = forwarded_variables(here, [])
    assert set(forwarded) == set(here) - {"LANG"}
    file = tmp_path / "file"
    file.write_text("OMP_NUM_THREADS=2\n\n# x\nexport LD_LIBRARY_PATH='/y'\n")
    files = forwarded_variables({}, [file])
    assert files == {"OMP_NUM_THREADS": "2", "LD_LIBRARY_PATH": "/y"}
    (line,) = map(str, environment.not_forwarded(forwarded, files))
    assert line.startswith("warning: GLOO_SOCKET_IFNAME: set here, but `deepspeed` does not forward them to the hosts")
    assert not list(environment.not_forwarded({}, files))


def test_the_doctor_forwards_what_the_launcher_forwards() -> None:
    """`FORWARDED` repeats what launch/multinode.sh sends. (`deepspeed` itself sends PYTHON….)"""
    script = (ROOT / "launch/multinode.sh").read_text()
    beginnings, names = re.findall(r'"\$name" =~ \^\(([A-Z_|]+)\)(?:_|\$)', script)
    sent = [*(f"{beginning}_X" for beginning in beginnings.split("|")), *names.split("|")]
    assert "CUDA_X" in sent and "LIME_BACKEND" in sent
    assert list(forwarded_variables(dict.fromkeys([*sent, "SECRET"], "1"), [])) == sent


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1 8\n", "line 1: 'node1 8' is not"),
        ("a slots=1\na slots=2\n", "a is listed twice"),
        ("# none\n", "lists no host"),
    ],
)
def test_mistakes_in_a_hostfile(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(LimeError, match=words):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(LimeError, match="cannot read the hostfile"):
        read_hostfile(tmp_path / "none")


def test_a_hostfile() -> None:
    assert read_hostfile(ROOT / "launch/hostfile.example") == {"node1": 8, "node2": 8}


def test_facts_of_this_machine(dataset: Path, tmp_path: Path) -> None:
    """The facts are right, and survive a round trip through JSON."""
    shards = tmp_path / "shards"
    shutil.copytree(dataset, shards)
    overrides = [*SMALL, f"data.path={shards}", f"run.directory={tmp_path / 'a/b'}"]

    def gather(verify: bool = False, **changes: Any) -> Facts:
        arguments = {
            "host": "here",
            "peers": ["localhost", "no.such.host.invalid"],
            "processes": 2,
            "probe": str(tmp_path),
            "port": 0,
        }
        config = str(ROOT / "configs/quickstart.yaml")
        return facts.gather(**{**arguments, "config_path": config, "overrides": overrides, "verify": verify, **changes})

    fact = gather()
    assert facts.from_json(facts.to_json(fact)) == fact
    assert (
        fact.sees_probe and fact.free_disk > 0 and fact.free_memory > 0 and fact.shards == 2 and not fact.data_problems
    )
    assert fact.routes == {"localhost": "127.0.0.1", "no.such.host.invalid": ""}
    assert fact.versions["torch"].startswith("2.") and fact.interfaces["lo"][0] == "127.0.0.1"
    assert gather(probe=str(tmp_path / "none")).sees_probe is False and gather(probe="").sees_probe is None
    assert gather(overrides=[*overrides, "train.seed=7"]).config != fact.config
    assert gather(overrides=["train.seeed=7"]).config_problem.startswith("unknown key train.seeed=7")

    (shard,) = shards.glob("validation-*.bin")
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    assert not gather().data_problems and "SHA-256 differs" in gather(verify=True).data_problems[0]
    shard.write_bytes(content[:-2])
    assert "bytes, but dataset.json says" in gather().data_problems[0]
    shard.unlink()
    assert "missing, though dataset.json lists it" in gather().data_problems[0]
    (shards / "dataset.json").unlink()
    assert "dataset.json: no such file" in gather().data_problems[0]


REFUSED = {
    "a vocabulary that is too small": (["model.vocab_size=100"], "model.vocab_size=100 is smaller than the 320 pieces"),
    "more validation samples than there are": (
        ["train.evaluation_samples=100000"],
        "train.evaluation_samples=100000, but ",
    ),
    "validation samples that do not divide": (
        ["train.evaluation_samples=7"],
        "train.evaluation_samples=7 is no multiple of",
    ),
    "samples longer than the split": (["data.sequence_length=1000000"], "tokens, one sample needs 1000001"),
    "sample texts longer than a sample": (
        ["monitor.samples={{prompts: [alpha], tokens: 100000}}"],
        "monitor.samples.tokens=100000 are more than data.sequence_length=",
    ),
    "an answer token beyond the vocabulary": (["data.answer_token=99999"], "data.answer_token=99999"),
    "a run folder of another model": (
        ["model.hidden_size=32"],
        "global_step4 is of another run (model.hidden_size: 16 there, 32 here)",
    ),
    "a run folder of another order": (["data.seed=5"], "is of another run (data.seed: 0 there, 5 here)"),
    "a run folder of another optimizer": (["optimizer.name=scaled"], None),
    "a run folder whose checkpoints are damaged": (["run.directory={damaged}"], "no whole checkpoint in "),
    "a run folder that is a file": (["run.directory={file}/run"], "Not a directory"),
}
"""Overrides, and words of the line; None: the configuration itself is refused."""


@pytest.fixture(scope="module")
def run_folders(
    workers: Callable[[int], WorkerGroup], dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The folder of a run of the `SMALL` model; the same with a damaged manifest; and a file."""
    root = tmp_path_factory.mktemp("runs")
    config = load_config(None, [*RUN, f"data.path={dataset}", f"run.directory={root / 'run'}"])
    assert set(workers(2).run("support.runs.run", values=config.model_dump(mode="json"))) == {""}
    shutil.copytree(root / "run", root / "damaged")
    (root / "damaged/checkpoints/global_step4/manifest.json").write_text("{")
    (root / "file").write_text("")
    return {name: root / name for name in ("run", "damaged", "file")}


RUN = [
    *SMALL,
    "train.steps=4",
    "optimizer.warmup_steps=1",
    "train.checkpoint_interval=0",
    "train.evaluation_interval=0",
]


@pytest.mark.parametrize("name", REFUSED)
def test_the_doctor_refuses_what_pretrain_refuses(
    workers: Callable[[int], WorkerGroup], dataset: Path, run_folders: dict[str, Path], name: str
) -> None:
    """With the same line, which both get from the same code."""
    changes, words = REFUSED[name]
    overrides = [*RUN, f"data.path={dataset}", f"run.directory={run_folders['run']}"]
    overrides += [change.format(**run_folders) for change in changes]
    if words is None:
        with pytest.raises(LimeError, match="optimizer.name='scaled'"):
            load_config(None, overrides)
        return
    config = load_config(None, overrides)
    refusals, *_ = preflight(config, processes=2)
    assert len(refusals) == 1 and words in refusals[0], refusals
    assert workers(2).run("support.runs.run", values=config.model_dump(mode="json")) == refusals * 2


def test_a_run_folder_below_one_that_this_user_may_not_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It cannot even be looked up. (root may search everything, so the refusal is played.)"""
    (tmp_path / "closed").mkdir()
    look_up, access = os.stat, os.access

    def refusing(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if "/closed/" in os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return look_up(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed") and access(path, mode))
    assert "Permission denied" in str(why_not_writable(tmp_path / "closed/team/run"))


def test_a_pair_with_tokens_beyond_the_vocabulary_is_refused_before_the_run(tmp_path: Path) -> None:
    """A pair does not state its vocabulary: the doctor reads the first samples."""
    with IndexedWriter(tmp_path / "pair", np.uint16) as writer:
        for _ in range(300):
            writer.add_document(np.full(20, 300, dtype=np.uint16))
    overrides = [*RUN, f"data.path={tmp_path / 'pair'}", f"run.directory={tmp_path / 'run'}", "model.vocab_size=256"]
    (refusal,), *_ = preflight(load_config(None, overrides), processes=2)
    assert "holds tokens 300 to 300, but model.vocab_size=256" in refusal


def test_a_run_that_fits_is_not_refused_and_its_open_settings_are_told(
    dataset: Path, run_folders: dict[str, Path]
) -> None:
    overrides = [*RUN, f"data.path={dataset}", "train.micro_batch_size=1", "train.global_batch_size=3"]
    for directory in (run_folders["run"], run_folders["run"].parent / "new"):
        config = load_config(None, [*overrides, f"run.directory={directory}"])
        refusals, warnings, notes = preflight(config, processes=6)
        assert refusals == warnings == [] and [note.split(",")[0] for note in notes] == ["validations have 63 samples"]
        assert preflight(config, processes=4) == ([], [], []), "that 2 does not divide 3 is reported elsewhere"


def test_doubtful_settings_are_warnings() -> None:
    (line,) = problems(findings_for(on=job("optimizer.warmup_steps=50")))
    assert line.startswith("warning: optimizer.warmup_steps=50 is no less than train.steps=40")


@pytest.mark.parametrize(
    ("duration", "rate"), [(0.0, 0.0), (1e-9, 0.0), (1e-4, 2**20 / 5e-5), (2e-4, 2**20 / 1e-4), (1.0, 2**20 / 0.9998)]
)
def test_a_transfer_that_takes_no_time_has_no_absurd_rate(duration: float, rate: float) -> None:
    assert bandwidth(2**20, duration, latency=1e-4) == pytest.approx(rate)
    (line,) = map(str, network.check_links({("a", "b"): Link(rate, 1e-4)}))
    assert ("faster than can be measured" in line) == (not rate) and line.startswith("ok: a to b: ")


def test_the_hash_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "lime_dist").mkdir()
    before = facts.hash_code(tmp_path)
    (tmp_path / "lime_dist/a.py").write_text("x = 1\n")
    (tmp_path / "lime_dist/notes.txt").write_text("not code")
    after = facts.hash_code(tmp_path)
    (tmp_path / "lime_dist/a.py").rename(tmp_path / "lime_dist/b.py")
    assert len({before, after, facts.hash_code(tmp_path)}) == 3


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lime_dist.doctor", *arguments]
    kept = {key: value for key, value in os.environ.items() if key != "DS_ENV_FILE"}
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_command_on_this_machine(dataset: Path, tmp_path: Path) -> None:
    """Checks its lines, a ring of two processes, and the exit status with and without an error."""
    arguments = ["--config", "configs/quickstart.yaml", *SMALL, f"run.directory={tmp_path}"]
    good = doctor(*arguments, f"data.path={dataset}", "--compute=1")
    *lines, announced, devices = good.stdout.splitlines()
    assert announced == "all devices multiply matrices for 1 s …"
    speeds = re.search(r"2 device\(s\), (\d+\.\d+) to (\d+\.\d+) TFLOP/s each$|(\d+\.\d+) TFLOP/s, \d+% below", devices)
    assert speeds and all(0 < float(speed) < 100 for speed in speeds.groups() if speed), devices
    assert good.returncode == 0 and not good.stderr, good.stdout + good.stderr
    assert all(line.startswith("ok: ") for line in lines), lines
    assert sum("MB/s, latency" in line for line in lines) == 2
    assert not list(tmp_path.iterdir()), "it leaves no file"
    bad = doctor(*arguments, f"data.path={tmp_path / 'none'}")
    assert bad.returncode == 2 and "error: " in bad.stdout and "no such folder" in bad.stdout and not bad.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no configuration given; see python -m lime_dist.doctor --help"),
        (["--compute=0"], "--compute 0: give a number of seconds above 0"),
        (["--config", "none.yaml"], "cannot read the configuration none.yaml"),
        (["--config", str(ROOT / "configs/quickstart.yaml"), "--hostfile", "none"], "cannot read the hostfile none"),
    ],
)
def test_mistakes_in_the_call(arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lime_dist.doctor.__main__ import main

    monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
    with pytest.raises(LimeError, match=re.escape(line)):
        main()


def test_help_has_an_example() -> None:
    finished = doctor("--help")
    assert finished.returncode == 0 and "python -m lime_dist.doctor --config configs/quickstart.yaml" in finished.stdout


def test_a_slow_device_stands_out() -> None:
    speeds = {"a": [1e14, 0.95e14], "b": [1.02e14, 0.7e14]}
    assert [str(finding) for finding in compute.check_devices(speeds)] == [
        "warning: b, device 1: 70.00 TFLOP/s, 28% below the median of all; look at its temperature, clock and power limit, and at what "
        "else runs there, or leave the host out",
        "ok: a: 2 device(s), 95.00 to 100.00 TFLOP/s each",
    ]


def test_answers_that_cannot_be_parsed() -> None:
    from lime_dist.doctor.hosts import Answer, parse_answers

    answers = {
        "a": Answer(facts.to_json(GOOD), "", 0.0),
        "b": Answer("", "Permission denied", 0.0),
        "c": Answer("Welcome to node c", "", 0.0),
        "d": Answer(json.dumps({"host": "d"}), "", 0.0),
    }
    good, bad = parse_answers(answers, facts.from_json)
    assert good == {"a": GOOD} and bad["b"] == "Permission denied" and "Welcome to node c" in bad["c"] and "d" in bad


def test_a_single_remote_host(capsys: pytest.CaptureFixture[str]) -> None:
    """`deepspeed` alone would train on this machine instead."""
    from lime_dist.doctor.diagnosis import Report, check_launcher

    for hosts, warned in (
        (["no.such.host.invalid"], True),
        (["localhost"], False),
        (["a.invalid", "b.invalid"], False),
    ):
        check_launcher(Report(), [], hosts)
        said = capsys.readouterr().out
        assert ("starts the processes of a single host here, not on no.such.host.invalid" in said) == warned
