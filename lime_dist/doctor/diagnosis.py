"""Asks all hosts, checks their answers, measures the links between them, and prints the findings."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lime_dist.config.load import load_config
from lime_dist.distributed import free_port
from lime_dist.doctor import checks, compute, environment, facts, network, ring
from lime_dist.doctor.facts import Facts
from lime_dist.doctor.findings import Finding, Findings, Job
from lime_dist.doctor.hosts import ask, environment_files, forwarded_variables, parse_answers, read_hostfile
from lime_dist.errors import LimeError
from lime_dist.hostfile import is_here

FACTS_TIMEOUT, RING_TIMEOUT = 40.0, 40.0
"""Seconds for a host's answer. Hashing shards (--verify) has no time limit."""


class Report:
    """Prints findings as they come.

    Attributes:
        failed: whether one of them was an error.
    """

    def __init__(self) -> None:
        self.failed = False

    def add(self, findings: Findings | Sequence[Finding]) -> bool:
        """Print findings; returns whether one of these is an error."""
        levels = set()
        for finding in findings:
            levels.add(finding.level)
            print(finding, flush=True)
        self.failed |= "error" in levels
        return "error" in levels


def diagnose(
    config_path: str,
    overrides: Sequence[str],
    hostfile: Path | None,
    verify: bool,
    compute_seconds: float | None = None,
) -> bool:
    """Print all findings; returns whether there is an error among them.

    Args:
        hostfile: None: check this machine only.
        verify: hash the shards instead of comparing their sizes only.
        compute_seconds: let all devices compute for so long; None: do not.
    """
    report = Report()
    config = load_config(config_path, overrides)
    over_ssh = hostfile is not None
    slots = {platform.node(): config.parallel.pipeline_stages} if hostfile is None else read_hostfile(hostfile)
    given = os.environ.get("MASTER_PORT", "29500")
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise LimeError(f"MASTER_PORT={given} is not a port; give 1 to 65535, such as 29500")
    port = int(given)
    files = environment_files() if over_ssh else []
    variables = forwarded_variables(os.environ, files)
    if over_ssh:
        check_launcher(report, files, list(slots))
    with probe_file(config.run.directory) as probe:
        questions = {
            host: {
                "host": host, "peers": [other for other in slots if other != host], "config_path": config_path,
                "overrides": overrides, "processes": sum(slots.values()), "probe": probe, "port": port, "verify": verify,
            }
            for host in slots
        }  # fmt: skip
        timeout = 1e6 if verify else FACTS_TIMEOUT
        commands = {host: ["--facts", json.dumps(question)] for host, question in questions.items()}
        answers = ask(commands, variables, timeout, over_ssh)
    by_host, failures = parse_answers(answers, facts.from_json)
    report.add(Finding("error", f"{host} does not answer: {problem}") for host, problem in failures.items())
    known = [replace(fact, skew=fact.clock - answers[host].arrived) for host, fact in by_host.items()]
    if known:
        report.add(checks.check_hosts(Job(config, slots), known))
    in_doubt = len(known) > 1 and report.add(network.check_network(known))
    if failures or in_doubt:
        report.add([Finding("warning", "links between hosts were not measured; fix the errors above first")])
    elif over_ssh and len(slots) > 1:
        address = network.master_address(known, os.environ.get("MASTER_ADDR"))
        measure_links(report, list(slots), known, address, port, variables, over_ssh)
    elif not over_ssh:
        ends = [f"{platform.node()}, process {index}" for index in range(2)]
        measure_links(report, ends, known, "127.0.0.1", free_port(), variables, over_ssh)
    if compute_seconds is not None and known and not failures:
        measure_devices(report, slots, known, compute_seconds, variables, over_ssh)
    return report.failed


def check_launcher(report: Report, files: Sequence[Path], hosts: Sequence[str]) -> None:
    """Check what `deepspeed` needs here to start processes on other hosts."""
    if len(hosts) == 1 and not is_here(hosts[0]):
        text = (
            f"`deepspeed` alone starts the processes of a single host here, not on {hosts[0]}; use launch/multinode.sh, or "
            "give it --force_multi"
        )
        report.add([Finding("warning", text)])
    for path in files:
        report.add(environment.environment_file(str(path), path.read_text()))
    report.add(environment.not_forwarded(forwarded_variables(os.environ, []), forwarded_variables({}, files)))
    if shutil.which("pdsh") is None:
        text = (
            "pdsh is not installed here; `deepspeed` needs it to start processes on other hosts: apt-get install pdsh"
        )
        report.add([Finding("error", text)])


def measure_links(
    report: Report,
    ends: Sequence[str],
    known: Sequence[Facts],
    address: str,
    port: int,
    variables: Mapping[str, str],
    over_ssh: bool,
) -> None:
    """Run the ring between ``ends`` (hosts, or processes of this machine) and report each link."""
    devices = network.ring_devices(known, len(ends))
    arguments = {
        end: {
            "rank": rank, "size": len(ends), "address": address, "port": port,
            "device": devices[rank], "timeout": RING_TIMEOUT / 2,
        }
        for rank, end in enumerate(ends)
    }  # fmt: skip
    commands = {end: ["--ring", json.dumps(given)] for end, given in arguments.items()}
    links, failures = parse_answers(ask(commands, variables, RING_TIMEOUT, over_ssh), ring.from_json)
    report.add(
        Finding("error", f"transfers between hosts fail; {end} reports: {problem}") for end, problem in failures.items()
    )
    if not failures:
        pairs = {(end, ends[(rank + 1) % len(ends)]): links[end] for rank, end in enumerate(ends)}
        report.add(network.check_links(pairs))


def measure_devices(
    report: Report,
    slots: Mapping[str, int],
    known: Sequence[Facts],
    seconds: float,
    variables: Mapping[str, str],
    over_ssh: bool,
) -> None:
    """Let the devices of all hosts compute at the same time, and report their speeds."""
    print(f"all devices multiply matrices for {seconds:g} s …", flush=True)
    on_gpu = {fact.host: fact.on_gpu for fact in known}
    commands = {
        host: ["--devices", json.dumps({"processes": count, "on_gpu": on_gpu[host], "seconds": seconds})]
        for host, count in slots.items()
    }
    answers = ask(commands, variables, seconds + FACTS_TIMEOUT, over_ssh)
    speeds, failures = parse_answers(answers, compute.from_json)
    report.add(Finding("error", f"{host}: its devices do not compute: {problem}") for host, problem in failures.items())
    if speeds:
        report.add(compute.check_devices(speeds))


@contextmanager
def probe_file(directory: str) -> Iterator[str]:
    """A temporary file in the run folder or in the nearest folder above it; all hosts should see it. Yields its path, or "" if
    it cannot be created."""
    folder = facts.existing_parent(Path(directory))
    try:
        file: Any = tempfile.NamedTemporaryFile(prefix=".lime-doctor-", dir=folder)
    except OSError:
        yield ""
        return
    with file:
        yield file.name
