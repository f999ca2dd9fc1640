"""Findings about the launcher's variables: what travels to the hosts, and the file that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lime_dist.doctor.findings import Finding, Findings, Level
from lime_dist.doctor.hosts import BY_ITSELF


def environment_file(name: str, text: str) -> Findings:
    """A `.deepspeed_env` as `deepspeed` reads it: every line NAME=value, and nothing else is understood."""
    trouble = False
    for number, line in enumerate(text.splitlines(), 1):
        found = _line_trouble(line)
        if found is not None:
            trouble = True
            yield Finding(found[0], f"{name}, line {number}: {found[1]}")
    if not trouble:
        yield Finding("ok", f"{name} can be read by the launcher")


def _line_trouble(line: str) -> tuple[Level, str] | None:
    key, separator, value = line.partition("=")
    key, value = key.strip(), value.strip()
    if not line.strip():
        return "error", "is blank, and `deepspeed` ends with a traceback there; remove it"
    if not separator or line.lstrip().startswith("#"):
        return "error", f"{line.strip()!r} is not NAME=value, which `deepspeed` does not understand; remove it"
    if key.startswith("export "):
        return "warning", f"leave `export` out: {key.removeprefix('export ').strip()}={value}"
    if not re.fullmatch(r"[A-Za-z_]\w*", key):
        return "error", f"{key!r} is no name of a variable"
    if '"' in value:
        return (
            "error",
            f"quotes are added by `deepspeed`, and a quote inside ends them; write {key}={value.replace(chr(34), '')}",
        )
    if "'" in value:
        return "warning", f"quotes become part of the value; write {key}={value.strip(chr(39))}"
    if re.search(r"[$`\\]", value):
        return "warning", f"the shell of each host will expand {value!r}; write what it should become"
    return None


def left_behind(set_here: Mapping[str, str], in_files: Mapping[str, str]) -> Findings:
    """Variables that are set here and matter there, which `deepspeed` alone would not take along."""
    names = [name for name in set_here if name not in in_files and not BY_ITSELF.match(name)]
    if names:
        yield Finding(
            "warning",
            f"{', '.join(sorted(names))}: set here, but `deepspeed` takes them nowhere; start by launch/multinode.sh, or write "
            "them into .deepspeed_env",
        )
