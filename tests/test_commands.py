"""Protects what all commands share: an option with one value is refused when it is given twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lime_dist.commands import CommandParser

ROOT = Path(__file__).resolve().parents[1]


def parser() -> CommandParser:
    made = CommandParser(prog="command", description="A command.")
    made.add_argument("--config")
    made.add_argument("--names", nargs="+")
    made.add_argument("--where", action="append")
    made.add_argument("--verbose", action="store_true")
    made.add_argument("overrides", nargs="*")
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "a", "--config", "b"],
        ["--config=a", "x=1", "--config=a"],
        ["--conf", "a", "--config", "b"],
        ["--names", "a", "b", "--names", "c"],
    ],
)
def test_an_option_given_twice_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_intermixed_args(words)
    assert stopped.value.code == 2 and "is given twice; give it once" in capsys.readouterr().err


def test_options_may_come_between_overrides_and_repeat_where_they_add_up() -> None:
    made = parser()
    for _ in range(2):  # a parser can be used again
        given = made.parse_intermixed_args(["a=1", "--config", "c", "--where", "x", "b=2", "--where", "y", "--verbose"])
        assert (given.config, given.where, given.overrides) == ("c", ["x", "y"], ["a=1", "b=2"])


def test_every_command_uses_this_parser() -> None:
    """The `store` of argparse itself appears in no command, so none can silently prefer the second value."""
    sources = [ROOT / "pretrain.py", *(ROOT / "lime_dist").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")]
    others = [path for path in sources if path.name != "commands.py" and "argparse.ArgumentParser(" in path.read_text()]
    assert others == []
    subcommand = CommandParser(prog="command").add_subparsers().add_parser("sub")
    assert isinstance(subcommand, CommandParser)


def test_pretrain_refuses_two_configurations() -> None:
    words = ["pretrain.py", "--config", "configs/quickstart.yaml", "--config", "configs/deep/lime_32.yaml"]
    finished = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2 and "argument --config: is given twice" in finished.stderr
