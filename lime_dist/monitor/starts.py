"""Keeps the configuration, the command and the environment of every start of a run.

config.yaml, environment.txt                those of the newest start
starts/001/config.yaml, environment.txt     those of the first start; nothing in ``starts`` is ever overwritten
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from lime_dist.config.load import dump_config
from lime_dist.config.schema import Config
from lime_dist.data.files import write_atomic
from lime_dist.launchers import world_size
from lime_dist.versions import installed_version

PACKAGES = ("torch", "deepspeed", "numpy", "sentencepiece", "datasets", "tensorboard")
"""Packages whose versions ``environment.txt`` lists."""
ROOT = Path(__file__).resolve().parents[2]
CONFIG, ENVIRONMENT, STARTS = "config.yaml", "environment.txt", "starts"


def record_start(directory: Path, config: Config, step: int) -> Path:
    """Write the configuration and the environment of this start, and return the folder that keeps them.

    Args:
        step: the step that the run starts from.

    Raises:
        OSError: they cannot be written.
    """
    starts = directory / STARTS
    numbers = [int(path.name) for path in starts.glob("[0-9]*") if path.name.isdecimal()]
    if not numbers and (directory / CONFIG).is_file():
        _keep(directory, starts / "000")  # of an earlier version, which kept only the newest start
    folder = starts / f"{max(numbers, default=0) + 1:03d}"
    folder.mkdir(parents=True)
    environment = describe_environment(step)
    for place in (folder, directory):
        write_atomic(place / CONFIG, dump_config(config).encode())
        write_atomic(place / ENVIRONMENT, environment.encode())
    return folder


def _keep(directory: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (CONFIG, ENVIRONMENT):
        if (directory / name).is_file():
            shutil.copy2(directory / name, folder / name)


def describe_environment(step: int) -> str:
    """When and from which step a run starts, its command, commit, host, GPUs and versions, one a line."""
    lines = [
        f"start: {time.strftime('%Y-%m-%d %H:%M:%S %z')}, from step {step}",
        f"command: {shlex.join(sys.argv)}",
        f"folder: {os.getcwd()}",
        f"commit: {describe_commit(ROOT)}",
        f"host: {platform.node()}, {platform.platform()}, {os.cpu_count()} cores, {world_size()} processes",
        f"GPUs: {describe_gpus()}",
        f"python: {platform.python_version()}",
        *(f"{name}: {installed_version(name)}" for name in PACKAGES),
    ]
    return "\n".join(lines) + "\n"


def describe_commit(root: Path) -> str:
    """The git commit of the source files, and whether they have changed since."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)

    try:
        head = git("rev-parse", "--show-toplevel", "HEAD")
        top, _, commit = head.stdout.strip().partition("\n")
        if head.returncode or Path(top) != root:
            return "none (not a git repository)"
        changed = git("diff", "--quiet", "HEAD").returncode
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (git does not answer)"
    return commit + (" with uncommitted changes" if changed else "")


def describe_gpus() -> str:
    """Names and memory of the GPUs of this host that the process sees."""
    if not torch.cuda.is_available():
        return "none"
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{each.name} ({each.total_memory / 1e9:.0f} GB)" for each in properties]
    counted = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return f"{counted}, CUDA {torch.version.cuda}"
