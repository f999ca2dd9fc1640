"""Tests of how the processes of a job find each other: what cannot work is one line before torch tries."""

from __future__ import annotations

import errno
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lime_dist.distributed import free_port
from lime_dist.errors import LimeError
from lime_dist.hostfile import is_here, port_problem
from lime_dist.launchers import check_devices
from lime_dist.rendezvous import check_rendezvous

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        made.listen()
        yield made


def job(monkeypatch: pytest.MonkeyPatch, rank: int, port: int, address: str = "127.0.0.1", **more: str) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        **more,
    }.items():
        monkeypatch.setenv(name, value)


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    job(monkeypatch, 0, port)
    with pytest.raises(LimeError, match=rf"^port {port} of .* cannot be used \(Address already in use\)"):
        check_rendezvous(0)
    job(monkeypatch, 0, port, TORCHELASTIC_USE_AGENT_STORE="True")  # torchrun listens there itself
    check_rendezvous(0)
    job(monkeypatch, 0, free_port())
    check_rendezvous(0)


def test_a_kernel_without_ipv6(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    """`socket.has_ipv6` speaks of Python, not of the kernel, and names may still have IPv6 addresses."""
    make, free = socket.socket, free_port()

    def make_without_ipv6(kind: int = socket.AF_INET, *arguments: int) -> socket.socket:
        if kind == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return make(kind, *arguments)

    names = [(kind, 0, 0, "", (name, 0)) for kind, name in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1"))]
    monkeypatch.setattr(socket, "socket", make_without_ipv6)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: names)
    assert port_problem(free) is None
    assert "cannot be used" in str(port_problem(listener.getsockname()[1]))
    assert is_here("localhost")


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1", "Connection refused"), ("no.such.host.invalid", r"Name or service not known|.*name resolution")],
)
def test_a_first_host_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, address: str, reason: str) -> None:
    job(monkeypatch, 1, free_port(), address)
    with pytest.raises(LimeError, match=rf"does not reach the first process of the job at {address}:\d+ \(({reason})"):
        check_rendezvous(0)


@pytest.mark.parametrize(
    ("address", "port"), [("", "29500"), ("127.0.0.1", ""), ("127.0.0.1", "x"), ("127.0.0.1", "99999")]
)
def test_half_of_a_launcher(monkeypatch: pytest.MonkeyPatch, address: str, port: str) -> None:
    job(monkeypatch, 1, 0, address, MASTER_PORT=port)
    with pytest.raises(LimeError, match=f"^RANK is set, but MASTER_ADDR={address} and MASTER_PORT={port} are not"):
        check_rendezvous(0)


def test_the_others_wait_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    job(monkeypatch, 1, port)
    with socket.socket() as late:
        late.bind(("127.0.0.1", port))
        timer = threading.Timer(0.3, late.listen)
        timer.start()
        check_rendezvous(60)
        timer.join()


def test_a_port_in_use_is_one_line(listener: socket.socket, dataset: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu",
        "MASTER_PORT": str(listener.getsockname()[1]),
    }  # fmt: skip
    overrides = [f"data.path={dataset}", f"run.directory={tmp_path / 'run'}", "parallel.pipeline_stages=1"]
    command = [sys.executable, "pretrain.py", "--config", "configs/quickstart.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: port ") and done.stderr.count("\n") == 1, done.stderr


LAUNCHED = """
import os, subprocess, sys
# deepspeed: starts a process as that launcher does, on devices of its own choice
os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[1]  # the environment with which this process was started stays visible in /proc
check = "from lime_dist.errors import run_command; from lime_dist.launchers import check_devices; run_command(check_devices)"
sys.exit(subprocess.run([sys.executable, "-c", check]).returncode)
"""


@pytest.mark.parametrize(
    ("given", "used", "refused"),
    [
        (None, "0,1", False), ("", "0,1", False), ("0,1,2,3", "0,1", False), ("3", "3", False), ("1,0", "0,1", False),
        ("3", "0", True), ("2,3", "0,1", True), ("GPU-12", "0", True), ("MIG-GPU-1/0/0", "0", True), ("0", "0,1", True),
    ],
)  # fmt: skip
def test_other_devices_than_the_users_are_refused(given: str | None, used: str, refused: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    command = [sys.executable, "-c", LAUNCHED, used]
    # A shell whose command line names the launcher as well is no launcher that knows the variable.
    shell = ["bash", "-c", f"{'' if given is None else f'CUDA_VISIBLE_DEVICES={given} '}{shlex.join(command)}; exit $?"]
    bare = {name: value for name, value in environment.items() if name != "CUDA_VISIBLE_DEVICES"}
    for words, variables in ((command, environment), (shell, bare)):
        done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == (2 if refused else 0), done.stderr
        assert done.stderr.startswith(f"error: CUDA_VISIBLE_DEVICES={given} was given, but") == refused


def test_without_a_launcher_any_devices_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    check_devices()
