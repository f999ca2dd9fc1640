"""Reaching the hosts as the launcher does: the hostfile, ssh, and which variables travel."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lime_dist.errors import LimeError

TRAVELLING = re.compile(r"(NCCL|GLOO|TORCH|UCX|OMP)_|PYTHON|DS_ACCELERATOR$")
"""Beginnings of the names that `launch/multinode.sh` takes to the hosts."""
BY_ITSELF = re.compile(r"NCCL|PYTHON|UCX|MV2|MLFLOW")
"""Those of them that `deepspeed` takes along by itself, NCCL's on GPUs alone."""
SSH = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=5"]


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes by host, in order; the launcher's format: ``HOST slots=N``, comments, blank lines."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise LimeError(
            f"cannot read the hostfile {path}: {error.strerror}; give --hostfile an existing file"
        ) from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        match = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if match is None:
            raise LimeError(f"{path}, line {number}: {line.strip()!r} is not 'HOST slots=N'")
        if words[0] in found:
            raise LimeError(f"{path}, line {number}: {words[0]} stands twice")
        found[words[0]] = int(match[1])
    if not found:
        raise LimeError(f"{path} lists no host; write a line 'HOST slots=N' for each")
    return found


def environment_files() -> list[Path]:
    """The files from which `deepspeed` takes variables to the hosts; those that exist."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = dict.fromkeys(Path(folder) / name for folder in (Path.home(), Path(".")))
    return [path for path in paths if path.is_file()]


def travelling_variables(environment: Mapping[str, str], files: Sequence[Path]) -> dict[str, str]:
    """What processes on the hosts will find set: by the launcher, and by its files as far as they can be read."""
    found = {name: value for name, value in environment.items() if TRAVELLING.match(name)}
    for path in files:
        for line in path.read_text().splitlines():
            name, separator, value = line.strip().removeprefix("export ").partition("=")
            if separator and re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
                found[name.strip()] = value.strip().strip("\"'")
    return found


@dataclass(frozen=True)
class Answer:
    """What a host said: its output's last line and when it was complete, or why there is none."""

    line: str
    problem: str
    arrived: float


def ask(
    commands: Mapping[str, Sequence[str]], variables: Mapping[str, str], patience: float, over_ssh: bool
) -> dict[str, Answer]:
    """Run ``python -m lime_dist.doctor`` on all hosts at once, in this directory, as the launcher would run a program.

    Args:
        commands: arguments by host.
        variables: what is set there.
        patience: seconds after which a host that has not answered is given up.
        over_ssh: False: the "hosts" are processes of this machine.
    """

    def ask_one(host: str) -> Answer:
        words = [sys.executable, "-m", "lime_dist.doctor", *commands[host]]
        if over_ssh:
            settings = [f"{name}={value}" for name, value in variables.items()]
            words = [*SSH, host, f"cd {shlex.quote(os.getcwd())} && {shlex.join(['env', *settings, *words])}"]
        try:
            finished = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience, check=False
            )
        except subprocess.TimeoutExpired:
            return Answer("", f"no answer within {patience:g} s", time.time())
        except OSError as error:
            return Answer("", f"{words[0]}: {error.strerror}", time.time())
        lines = finished.stdout.strip().splitlines()
        if finished.returncode == 0 and lines:
            return Answer(lines[-1], "", time.time())
        said = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        return Answer("", said[-1], time.time())

    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(ask_one, commands), strict=True))
