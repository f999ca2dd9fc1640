"""Parse the pages of the documentation: shell commands, YAML blocks, links, and names in code marks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/RESULTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
EXTERNAL_FLAGS = {
    "deepspeed": {"--num_gpus", "--hostfile"},
    "torchrun": {"--nproc_per_node"},
    "sbatch": {"--nodes", "--array"},
}
"""Flags of other projects' launchers, which stand before the name of our script."""
OTHER_PROGRAMS = {"pip", "source", "printf", "tensorboard", "ruff", "mypy", "python3", "cd"}
WITH_SUBCOMMANDS = {"data_tools.tokenizer", "data_tools.sources", "data_tools.tasks"}
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.+")


@dataclass(frozen=True)
class Command:
    """One command line of a page, with continuation lines joined and without its comment."""

    page: Path
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text}"


@dataclass(frozen=True)
class Call:
    """A call of one of our modules or scripts.

    Attributes:
        target: module after ``python -m``, or path of a script.
        subcommand: such as ``train``; empty if the target has none.
        arguments: the words after these.
        launcher: ``deepspeed``, ``torchrun`` or ``sbatch``, with its own arguments; empty without one.
    """

    target: str
    subcommand: str
    arguments: tuple[str, ...]
    launcher: tuple[str, ...] = ()

    @property
    def flags(self) -> set[str]:
        return {word.partition("=")[0] for word in self.arguments if word.startswith("--")}

    @property
    def overrides(self) -> list[str]:
        return [word for word in self.arguments if OVERRIDE.fullmatch(word)]

    def option(self, flag: str) -> str | None:
        words = self.arguments
        return words[words.index(flag) + 1] if flag in words else None


def blocks(page: Path, language: str) -> list[str]:
    """Return the contents of the page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[Command]:
    """Return all commands of the page, without the words of a loop around them."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.strip() for line in lines if not line.startswith(("for ", "done", "#"))]
    texts = [" ".join(re.sub(r"\s+# .*", "", line).split()) for line in lines]
    return [Command(page, part) for text in texts if text for part in text.split(" && ")]


def call(command: Command) -> Call | None:
    """Return the call of our module or script; None for another program.

    Raises:
        ValueError: the program is unknown.
    """
    words = shlex.split(command.text.partition(" > ")[0])
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program in OTHER_PROGRAMS or rest[:2] == ["-m", "pytest"]:
        return None
    if program == "python" and rest[0] == "-m":
        subcommand = rest[2] if rest[1] in WITH_SUBCOMMANDS else ""
        return Call(rest[1], subcommand, tuple(rest[3 if subcommand else 2 :]))
    if program in ("python", "bash"):
        return Call(rest[0], "", tuple(rest[1:]))
    if program in EXTERNAL_FLAGS:
        at = next(index for index, word in enumerate(rest) if word.endswith((".py", ".sbatch")))
        return Call(rest[at], "", tuple(rest[at + 1 :]), (program, *rest[:at]))
    raise ValueError(f"{command}: unknown program {program}; see {__name__}")


def yaml_files(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the path in a YAML block's first comment (empty without one) and the block."""
    for block in blocks(page, "yaml"):
        named = re.match(r"# (\S+\.yaml)\n", block)
        yield named[1] if named else "", block


def code_marks(page: Path) -> list[str]:
    """Return the texts in single backticks outside of fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def links(page: Path) -> list[str]:
    """Return the targets of the page's links and pictures within the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
