"""Findings about environment variables: which ones reach the hosts, and the file that lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lime_dist.doctor.findings import Finding, Findings, Level
from lime_dist.doctor.hosts import FORWARDED_BY_DEEPSPEED


def environment_file(name: str, text: str) -> Findings:
    """Check a `.deepspeed_env`, of which `deepspeed` understands lines NAME=value and nothing else."""
    problems = False
    for number, line in enumerate(text.splitlines(), 1):
        problem = _problem_of(line)
        if problem is not None:
            problems = True
            yield Finding(problem[0], f"{name}, line {number}: {problem[1]}")
    if not problems:
        yield Finding("ok", f"the launcher can read {name}")


def _problem_of(line: str) -> tuple[Level, str] | None:
    key, separator, value = line.partition("=")
    key, value = key.strip(), value.strip()
    if not line.strip():
        return "error", "is blank, which ends `deepspeed` with a traceback; remove it"
    if not separator or line.lstrip().startswith("#"):
        return "error", f"{line.strip()!r} is not NAME=value, the only form that `deepspeed` understands; remove it"
    if key.startswith("export "):
        return "warning", f"leave `export` out: {key.removeprefix('export ').strip()}={value}"
    if not re.fullmatch(r"[A-Za-z_]\w*", key):
        return "error", f"{key!r} is not the name of a variable"
    if '"' in value:
        return (
            "error",
            f"`deepspeed` adds quotes, and a quote in the value ends them; write {key}={value.replace(chr(34), '')}",
        )
    if "'" in value:
        return "warning", f"the quotes become part of the value; write {key}={value.strip(chr(39))}"
    if re.search(r"[$`\\]", value):
        return "warning", f"the shell of each host expands {value!r}; write the expanded value"
    return None


def not_forwarded(set_here: Mapping[str, str], in_files: Mapping[str, str]) -> Findings:
    """Variables that are set here and matter on the hosts, but that `deepspeed` alone does not forward."""
    names = [name for name in set_here if name not in in_files and not FORWARDED_BY_DEEPSPEED.match(name)]
    if names:
        yield Finding(
            "warning",
            f"{', '.join(sorted(names))}: set here, but `deepspeed` does not forward them to the hosts; start with "
            "launch/multinode.sh, or write them into .deepspeed_env",
        )
