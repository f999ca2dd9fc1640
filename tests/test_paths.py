"""Tests of paths as users write them, in every command and every key of the configuration."""

from __future__ import annotations

import pwd
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lime_dist.config.load import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError
from lime_dist.paths import expand

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("A_1", "x y")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_expand(home: Path) -> None:
    user = pwd.getpwuid(0)
    for text, wanted in {
        "~": str(home), "~/": f"{home}/", "~/a/~b": f"{home}/a/~b", f"~{user.pw_name}/a": f"{user.pw_dir}/a",
        "$SCRATCH/a": "/scratch/me/a", "${SCRATCH}a/$A_1": "/scratch/mea/x y", "a$SCRATCH": "a/scratch/me",
        "./~a": "./~a", "a/~": "a/~", "a$": "a$", "5$-a": "5$-a", "a b": "a b", "": "", "hub:o/n@r:c": "hub:o/n@r:c",
    }.items():  # fmt: skip
        assert expand(text) == wanted


@pytest.mark.parametrize(
    "text", ["$UNSET/a", "${UNSET}", "a/$SCRATCH$UNSET", "$EMPTY/a", "${}", "${A-b}", "~nobody_here/a"]
)
def test_what_cannot_be_expanded_is_an_error(home: Path, text: str) -> None:
    with pytest.raises(LimeError, match="is not set; set it|there is no user 'nobody_here'"):
        expand(text)


def test_a_name_with_a_dollar_sign_that_exists(home: Path) -> None:
    (home / "a$UNSET").touch()
    assert expand("a$UNSET") == "a$UNSET"


def test_every_path_of_the_configuration(home: Path) -> None:
    """In the file and on the command line. A checkpoint's configuration is taken as it is."""
    (home / "c.yaml").write_text("run: {directory: ~/x}\ndata: {blend: [{path: $SCRATCH/a, weight: 1}]}\n")
    config = load_config("~/c.yaml")
    assert config.run.directory == f"{home}/x" and config.data.paths == ["/scratch/me/a"]
    config = load_config(None, ["run.directory=${SCRATCH}/r", "data.path=~/d"])
    assert config.run.directory == "/scratch/me/r" and config.data.path == f"{home}/d"
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert Config.model_validate({"run": {"directory": "$UNSET/r"}}).run.directory == "$UNSET/r"
    with pytest.raises(LimeError, match=r"^run.directory='\$UNSET/r' in the command line: .*variable UNSET is not set"):
        load_config(None, ["run.directory=$UNSET/r"])
    with pytest.raises(LimeError, match=r"^data.blend.0.path='~nobody_here/a' in the command line: .*no user"):
        load_config(None, ["data.blend=[{path: ~nobody_here/a, weight: 1}]"])


@pytest.mark.parametrize(
    "command",
    [
        "lime_dist.plan --config $UNSET/a",
        "lime_dist.plan --config c --timeline $UNSET/a",
        "lime_dist.doctor --config $UNSET/a",
        "lime_dist.doctor --config c --hostfile $UNSET/a",
        "lime_dist.report $UNSET/a",
        "lime_dist.report a --output $UNSET/a",
        "lime_dist.evaluate --model $UNSET/a --data b",
        "lime_dist.evaluate --model a --data $UNSET/a",
        "lime_dist.exact_match --model $UNSET/a --data b",
        "lime_dist.generate --model $UNSET/a --prompt b",
        "lime_dist.analysis $UNSET/a --data b",
        "lime_dist.analysis a --data $UNSET/b",
        "lime_dist.checkpoint.export --checkpoint $UNSET/a --output b",
        "lime_dist.checkpoint.export --checkpoint a --output $UNSET/b",
        "lime_dist.checkpoint.importing --model $UNSET/a --config c",
        "lime_dist.checkpoint.compress --checkpoint $UNSET/a --output b --chunk-size 2",
        "data_tools.inspect $UNSET/a",
        "data_tools.inspect a --tokenizer $UNSET/a",
        "data_tools.merge $UNSET/a b --output c",
        "data_tools.merge a b --output $UNSET/c",
        "data_tools.pretokenize --input $UNSET/a --tokenizer b --output c",
        "data_tools.pretokenize --input a --tokenizer $UNSET/b --output c",
        "data_tools.pretokenize --input a --tokenizer b --output $UNSET/c",
        "data_tools.tokenizer train --input $UNSET/a --output b --vocab-size 300",
        "data_tools.tokenizer train --input a --output $UNSET/b --vocab-size 300",
        "data_tools.tokenizer import --model $UNSET/a --output b",
        "data_tools.sources embedded --output $UNSET/a",
        "data_tools.tasks arithmetic --output $UNSET/a",
    ],
)
def test_every_path_of_a_command(home: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    (home / "c").write_text("{}")
    module, *arguments = command.split()
    name = next(name for name in (f"{module}.__main__", module) if _exists(name))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(LimeError, match=r"\$UNSET.*the variable UNSET is not set"):
        import_module(name).main()


def _exists(module: str) -> bool:
    return (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_one_line_and_exit_status_2() -> None:
    command = [sys.executable, "-m", "data_tools.inspect", "$UNSET_HERE/a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: the path '$UNSET_HERE/a': ")
    assert done.stderr.count("\n") == 1


def test_no_command_takes_a_path_as_it_is() -> None:
    """Guards commands that are still to be written."""
    sources = [path for folder in ("lime_dist", "data_tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in sources if "type=" + "Path" in path.read_text()] == []
