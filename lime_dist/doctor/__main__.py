"""The command ``python -m lime_dist.doctor``, and what it runs on each host: the same command with --facts or --ring."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lime_dist.config.load import load_config
from lime_dist.distributed import free_port
from lime_dist.doctor import facts, ring
from lime_dist.doctor.hosts import Answer, ask, environment_files, read_hostfile, travelling_variables
from lime_dist.errors import LimeError, run_command

T = TypeVar("T")

EXAMPLES = """examples:
  python -m lime_dist.doctor --config configs/quickstart.yaml
  python -m lime_dist.doctor --config configs/cluster/lime_64_2x8.yaml --hostfile hosts data.path=/shared/shards

Every finding is a line that begins with ok, warning or error. The exit status is 2 if there is an error, else 0.
Variables as for launch/multinode.sh: MASTER_ADDR, MASTER_PORT, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME."""

FACTS_PATIENCE, RING_PATIENCE = 40.0, 40.0
"""Seconds for a host's answer. Hashing shards (--verify) may take as long as it takes."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lime_dist.doctor",
        description="Look for what would spoil a long job, before it starts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file with the sections of a run; required")
    parser.add_argument(
        "--hostfile", type=Path, help="lines 'HOST slots=N'; without one, this machine alone is looked at"
    )
    parser.add_argument("--verify", action="store_true", help="hash the shards instead of looking at their sizes")
    parser.add_argument(
        "--facts", metavar="JSON", help=argparse.SUPPRESS
    )  # what this host is asked: facts.gather's arguments
    parser.add_argument(
        "--ring", metavar="JSON", help=argparse.SUPPRESS
    )  # this process's place: ring.measure's arguments
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args(words)


def main() -> None:
    arguments = parse()
    if arguments.facts is not None:
        answer(facts.to_json(facts.gather(**json.loads(arguments.facts))))
    if arguments.ring is not None:
        answer(ring.to_json(ring.measure(**json.loads(arguments.ring))))
    if arguments.config is None:
        raise LimeError("no configuration given; see python -m lime_dist.doctor --help")
    if examine(arguments):
        raise SystemExit(2)


def answer(line: str) -> None:
    """Print the line that was asked for and end at once, without any library's teardown."""
    print(line, flush=True)
    os._exit(0)


def examine(arguments: argparse.Namespace) -> bool:
    """Print all findings; whether there is an error among them."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to find out
    from lime_dist.doctor import (  # DeepSpeed takes seconds; hosts that are asked need none of it
        environment,
        judge,
        network,
    )
    from lime_dist.doctor.findings import Finding, Findings, Job

    config = load_config(arguments.config, arguments.overrides)
    over_ssh = arguments.hostfile is not None
    slots = read_hostfile(arguments.hostfile) if over_ssh else {platform.node(): config.parallel.pipeline_stages}
    job, port = Job(config, slots), int(os.environ.get("MASTER_PORT", "29500"))
    failed = False

    def say(findings: Findings | Sequence[Finding]) -> bool:
        nonlocal failed
        bad = False
        for finding in findings:
            bad |= finding.level == "error"
            print(finding, flush=True)
        failed |= bad
        return bad

    files = environment_files() if over_ssh else []
    variables = travelling_variables(os.environ, files)
    if over_ssh:
        for path in files:
            say(environment.environment_file(str(path), path.read_text()))
        say(environment.left_behind(travelling_variables(os.environ, []), travelling_variables({}, files)))
        if shutil.which("pdsh") is None:
            say(
                [
                    Finding(
                        "error",
                        "pdsh is not installed here, by which `deepspeed` starts other hosts; apt-get install pdsh",
                    )
                ]
            )

    with probe_file(config.run.directory) as probe:
        questions = {
            host: {
                "host": host, "peers": [other for other in slots if other != host], "config_path": arguments.config,
                "overrides": arguments.overrides, "probe": probe, "port": port, "verify": arguments.verify,
            }
            for host in slots
        }  # fmt: skip
        patience = 1e6 if arguments.verify else FACTS_PATIENCE
        answers = ask(
            {host: ["--facts", json.dumps(q)] for host, q in questions.items()}, variables, patience, over_ssh
        )
    read, unread = understood(answers, facts.from_json)
    say(Finding("error", f"{host} does not answer: {problem}") for host, problem in unread.items())
    known = [replace(fact, skew=fact.clock - answers[host].arrived) for host, fact in read.items()]
    if known:
        say(judge.judge(job, known))
    in_doubt = len(known) > 1 and say(network.judge(known))
    if unread or in_doubt:
        say([Finding("warning", "links between hosts were not measured; repair the errors above first")])
        return failed
    ends = list(slots) if over_ssh else [f"{platform.node()}, process {number}" for number in range(2)]
    if len(ends) > 1:
        address = network.master_address(known, os.environ.get("MASTER_ADDR")) if over_ssh else "127.0.0.1"
        port = port if over_ssh else free_port()
        devices = network.ring_devices(known, len(ends))
        places = {
            end: {
                "rank": rank, "size": len(ends), "address": address, "port": port,
                "device": devices[rank], "patience": RING_PATIENCE / 2,
            }
            for rank, end in enumerate(ends)
        }  # fmt: skip
        asked = {end: ["--ring", json.dumps(place)] for end, place in places.items()}
        found, missing = understood(ask(asked, variables, RING_PATIENCE, over_ssh), ring.from_json)
        say(
            Finding("error", f"transfers between hosts fail, says {end}: {problem}") for end, problem in missing.items()
        )
        if not missing:
            order = {(end, ends[(number + 1) % len(ends)]): found[end] for number, end in enumerate(ends)}
            say(network.links(order))
    return failed


def understood(answers: dict[str, Answer], read: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Answers that could be read, and why the others could not, by host."""
    good: dict[str, T] = {}
    bad: dict[str, str] = {}
    for host, found in answers.items():
        if found.problem:
            bad[host] = found.problem
            continue
        try:
            good[host] = read(found.line)
        except (ValueError, TypeError):
            bad[host] = f"it printed {found.line[:200]!r}"
    return good, bad


@contextmanager
def probe_file(directory: str) -> Iterator[str]:
    """A file beside the run folder, or in it, that the hosts are to see; removed again. Empty where none can be made."""
    folder = facts.existing_parent(Path(directory))
    try:
        file: Any = tempfile.NamedTemporaryFile(prefix=".lime-doctor-", dir=folder)
    except OSError:
        yield ""
        return
    with file:
        yield file.name


if __name__ == "__main__":
    run_command(main)
