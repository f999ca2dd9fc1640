"""Facts about one host: versions, code, configuration, data, networks, disk, memory. It does not interpret them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from lime_dist.config.load import dump_config, load_config
from lime_dist.config.schema import Config
from lime_dist.data.dataset import DATASET_FILE, check_shard_hashes, check_shard_sizes, read_dataset_json
from lime_dist.data.files import sha256_file
from lime_dist.data.indexed import IndexedDataset, pair_paths
from lime_dist.doctor.preflight import preflight
from lime_dist.errors import LimeError
from lime_dist.versions import installed_version

PACKAGES = ("torch", "deepspeed", "numpy")
ROOT = Path(__file__).resolve().parents[2]
NETWORK_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True)
class Facts:
    """What the doctor knows about one host.

    Attributes:
        host: its name in the hostfile.
        clock: seconds since the epoch when it answered; `skew` is how far that is ahead of the clock of the machine that asks.
        versions: of Python and of packages.
        code: hash of the program's source files.
        config: hash of the resolved configuration; empty if there is none, for the reason in `config_problem`.
        data: hash of dataset.json; empty if there is none, for the reasons in `data_problems`.
        shards: number of shards checked.
        refusals, warnings, notes: what pretrain.py would refuse, what is doubtful, and what it would remark; see `preflight`.
        interfaces: by name, the addresses of each network interface that is up.
        routes: by other host, the local address on the route to it; empty if there is none.
        addresses: by other host, the address that its name resolves to here.
        own_address: address that its own name resolves to, where gloo listens by default; empty if there is none.
        first_address: the first of `hostname -I`, which the launcher takes as the master address.
        port_is_free: whether a process could listen on the master port.
        variables: environment variables that choose networks and accelerators, as processes started here would have them.
        sees_probe: whether it sees the file that the asking machine created beside the run folder; None if there is no such file.
        free_disk: bytes, on the disk of the run folder.
        free_memory: bytes.
        gpus: bytes of memory of each GPU.
    """

    host: str
    clock: float
    versions: dict[str, str]
    code: str
    config: str
    config_problem: str
    data: str
    data_problems: list[str]
    shards: int
    interfaces: dict[str, list[str]]
    routes: dict[str, str]
    addresses: dict[str, str]
    own_address: str
    first_address: str
    port_is_free: bool
    variables: dict[str, str]
    sees_probe: bool | None
    free_disk: int
    free_memory: int
    gpus: list[int] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skew: float = 0.0

    @property
    def on_gpu(self) -> bool:
        """Whether processes here would train on GPUs."""
        return bool(self.gpus) and self.variables.get("DS_ACCELERATOR", "cuda") == "cuda"


def gather(
    host: str,
    peers: Sequence[str],
    config_path: str,
    overrides: Sequence[str],
    processes: int,
    probe: str,
    port: int,
    verify: bool,
) -> Facts:
    """Gather the facts about this machine.

    Args:
        host: its name in the hostfile.
        peers: names of the other hosts.
        processes: of the whole job.
        probe: path of a file that the asking machine created where all hosts should see it; empty: none.
        port: the master port.
        verify: hash the shards instead of comparing their sizes only.
    """
    config, problem = None, ""
    try:
        config = load_config(config_path, overrides)
    except LimeError as error:
        problem = str(error)
    data, data_problems, shards = ("", [], 0) if config is None else check_data(config.data.paths, verify)
    nothing = list[str](), list[str](), list[str]()
    refusals, warnings, notes = nothing if config is None or data_problems else preflight(config, processes)
    addresses = {peer: _resolve(peer) for peer in peers}
    return Facts(
        host=host,
        versions={"Python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        code=hash_code(ROOT),
        config="" if config is None else hash_config(config),
        config_problem=problem,
        data=data,
        data_problems=data_problems,
        shards=shards,
        refusals=refusals,
        warnings=warnings,
        notes=notes,
        interfaces=_interfaces(),
        routes={peer: _local_address(address) for peer, address in addresses.items()},
        addresses=addresses,
        own_address=_resolve(socket.gethostname()),
        first_address=_first_address(),
        port_is_free=_is_free(port),
        variables={name: os.environ[name] for name in (*NETWORK_VARIABLES, "DS_ACCELERATOR") if name in os.environ},
        sees_probe=Path(probe).exists() if probe else None,
        free_disk=0 if config is None else shutil.disk_usage(existing_parent(Path(config.run.directory))).free,
        free_memory=psutil.virtual_memory().available,
        gpus=[torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())],
        clock=time.time(),
    )


def to_json(facts: Facts) -> str:
    return json.dumps(asdict(facts))


def from_json(line: str) -> Facts:
    """Raises ValueError or TypeError if the line is not what `to_json` makes."""
    return Facts(**json.loads(line))


def hash_code(root: Path) -> str:
    """Hash of the program's source files, by path and content."""
    digest = hashlib.sha256()
    for path in (root / "pretrain.py", *sorted((root / "lime_dist").rglob("*.py"))):
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def hash_config(config: Config) -> str:
    """Hash of the resolved configuration: equal for equal settings, from whichever file or override they come."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()


def check_data(paths: Sequence[str], verify: bool) -> tuple[str, list[str], int]:
    """Hash of the files that describe the datasets, problems with their shards, number of shards."""
    described, problems, shards = hashlib.sha256(), list[str](), 0
    for path in paths:
        folder = Path(path)
        if not folder.is_dir() and pair_paths(path)[1].is_file():
            described.update(sha256_file(pair_paths(path)[1]).encode())
            problems += _problem(partial(IndexedDataset, path))
            shards += 1
            continue
        problems += _problem(partial(read_dataset_json, folder))
        if problems:
            return "", problems, 0
        described.update(sha256_file(folder / DATASET_FILE).encode())
        for split in read_dataset_json(folder).get("splits", {}).values():
            for shard in split.get("shards", ()):
                shards += 1
                problems += _problem(partial(_check_shard, folder, shard, verify))
    return described.hexdigest(), problems, shards


def _check_shard(folder: Path, shard: dict[str, Any], verify: bool) -> None:
    check_shard_sizes(folder, shard)
    if verify:
        check_shard_hashes(folder, shard)


def _problem(check: Callable[[], object]) -> list[str]:
    """The message of a check that fails."""
    try:
        check()
    except LimeError as error:
        return [str(error)]
    return []


def existing_parent(path: Path) -> Path:
    """The path itself if it is a folder, otherwise the nearest folder above it."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _interfaces() -> dict[str, list[str]]:
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: [a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def _resolve(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _local_address(address: str) -> str:
    """The local address on the route to an address. Asks the routing table; sends nothing."""
    if not address:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def _first_address() -> str:
    try:
        output = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
    return next(iter(output.split()), "")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return True
        except OSError:
            return False
