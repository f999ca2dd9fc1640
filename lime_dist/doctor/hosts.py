"""Reaches the hosts as the launcher does: the hostfile, ssh, and the environment variables that are forwarded."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lime_dist.errors import LimeError
from lime_dist.hostfile import HostfileError, parse_hostfile

T = TypeVar("T")

FORWARDED = re.compile(r"(CUDA|GLOO|NCCL|OMP|PYTORCH|TORCH|UCX)_|PYTHON|(DS_ACCELERATOR|LIME_BACKEND)$")
"""Beginnings of the names of variables that `launch/multinode.sh` forwards to the hosts."""
FORWARDED_BY_DEEPSPEED = re.compile(r"NCCL|PYTHON|UCX|MV2|MLFLOW")
"""Those that `deepspeed` forwards on its own (NCCL's only on GPUs)."""
SET_BY_DEEPSPEED = {"PYTORCH_NVML_BASED_CUDA_CHECK"}
"""Those that importing DeepSpeed sets, on every host alike."""
SSH = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=5"]


def read_hostfile(path: Path) -> dict[str, int]:
    """Number of processes by host, in order, from the launcher's format: ``HOST slots=N``, comments, blank lines."""
    try:
        return parse_hostfile(path)
    except OSError as error:
        raise LimeError(
            f"cannot read the hostfile {path}: {error.strerror}; give --hostfile an existing file"
        ) from None
    except HostfileError as error:
        raise LimeError(str(error)) from None


def environment_files() -> list[Path]:
    """The existing files from which `deepspeed` reads variables to forward."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = dict.fromkeys(Path(folder) / name for folder in (Path.home(), Path(".")))
    return [path for path in paths if path.is_file()]


def forwarded_variables(environment: Mapping[str, str], files: Sequence[Path]) -> dict[str, str]:
    """Variables that processes on the hosts will have, from the launcher and from the readable lines of its files."""
    variables = {
        name: value for name, value in environment.items() if FORWARDED.match(name) and name not in SET_BY_DEEPSPEED
    }
    for path in files:
        for line in path.read_text().splitlines():
            name, separator, value = line.strip().removeprefix("export ").partition("=")
            if separator and re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
                variables[name.strip()] = value.strip().strip("\"'")
    return variables


@dataclass(frozen=True)
class Answer:
    """A host's answer: the last line of its output and when it arrived (seconds since the epoch), or why there is none."""

    line: str
    problem: str
    arrived: float


def ask(
    commands: Mapping[str, Sequence[str]], variables: Mapping[str, str], timeout: float, over_ssh: bool
) -> dict[str, Answer]:
    """Run ``python -m lime_dist.doctor`` on all hosts at once, in this directory, as the launcher would run a program.

    Args:
        commands: arguments by host.
        variables: environment variables to set on the hosts.
        timeout: seconds to wait for an answer.
        over_ssh: False: the "hosts" are processes of this machine.
    """

    def ask_one(host: str) -> Answer:
        words = [sys.executable, "-m", "lime_dist.doctor", *commands[host]]
        if over_ssh:
            settings = [f"{name}={value}" for name, value in variables.items()]
            words = [*SSH, host, f"cd {shlex.quote(os.getcwd())} && {shlex.join(['env', *settings, *words])}"]
        try:
            finished = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return Answer("", f"no answer within {timeout:g} s", time.time())
        except OSError as error:
            return Answer("", f"{words[0]}: {error.strerror}", time.time())
        lines = finished.stdout.strip().splitlines()
        if finished.returncode == 0 and lines:
            return Answer(lines[-1], "", time.time())
        errors = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        return Answer("", errors[-1], time.time())

    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(ask_one, commands), strict=True))


def parse_answers(answers: Mapping[str, Answer], read: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Answers as ``read`` parses them, and for the other hosts the reason why there is none, both by host."""
    parsed: dict[str, T] = {}
    failures: dict[str, str] = {}
    for host, answer in answers.items():
        if answer.problem:
            failures[host] = answer.problem
            continue
        try:
            parsed[host] = read(answer.line)
        except (ValueError, TypeError):
            failures[host] = f"it printed {answer.line[:200]!r}"
    return parsed, failures
