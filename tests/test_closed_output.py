"""Tests of commands whose output nobody reads to its end, as in ``COMMAND | head``, and of Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLOSED = 141
"""128 + SIGPIPE: what a shell gives for a program that SIGPIPE has ended."""

MAIN = "from lime_dist.errors import *\nimport os, sys\ndef main():\n    {}\nrun_command(main)"


def without_reader(*words: str, both: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python with a stdout (and stderr) whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    try:
        errors = write if both else subprocess.PIPE
        # argparse ignores an error of its own writes; they are buffered, unless this variable is set.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=write, stderr=errors, text=True, check=False
        )
    finally:
        os.close(write)


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
@pytest.mark.parametrize(
    "body",
    [
        "print('a')",
        "print('a', flush=True)",
        "[print('a' * 99) for _ in range(9999)]",
        "print('a'); raise SystemExit(0)",
        "print('a'); raise LimeError('b')",
        "import argparse; argparse.ArgumentParser(description='x').parse_args(['--help'])",
    ],
)
def test_a_command_ends_without_a_word(body: str, both: bool) -> None:
    done = without_reader("-c", MAIN.format(body), both=both)
    assert done.returncode == CLOSED
    assert not done.stderr or (done.stderr == "error: b\n" and "LimeError" in body)


def test_other_broken_pipes_stay_errors() -> None:
    """A pipe to a worker process is not the output."""
    body = "read, write = os.pipe(); os.close(read); os.write(write, b'a')"
    done = subprocess.run(
        [sys.executable, "-c", MAIN.format(body)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_without_any_output() -> None:
    for redirection in (">&-", ">&- 2>&-", "2>&-"):
        command = f'{sys.executable} -c "{MAIN.format("print(1)")}" {redirection}'
        assert subprocess.run(["bash", "-c", command], cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize(
    "command",
    [["-m", "data_tools.inspect", "--help"], ["-m", "data_tools.pretokenize", "--help"], ["pretrain.py", "--help"]],
)
def test_help(command: list[str]) -> None:
    done = without_reader(*command)
    assert done.returncode == CLOSED and not done.stderr


def test_inspect(dataset: Path) -> None:
    done = without_reader("-m", "data_tools.inspect", str(dataset))
    assert done.returncode == CLOSED and not done.stderr


def test_an_interrupt_is_one_word() -> None:
    body = f"os.kill(os.getpid(), {int(signal.SIGINT)}); import time; time.sleep(9)"
    done = subprocess.run(
        [sys.executable, "-c", MAIN.format(body)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
