"""Protects the documentation: its commands, links, paths and configuration keys are valid, and its commands run."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.documents import (
    EXTERNAL_FLAGS,
    PAGES,
    ROOT,
    Command,
    anchors,
    call,
    code_marks,
    commands,
    links,
    yaml_files,
)
from support.exports import run_values
from support.vocabularies import gpt_2
from support.workers import WorkerGroup

from lime_dist.config.load import load_config, make_config
from lime_dist.config.page import sections

CALLS = [(command, found) for page in PAGES for command in commands(page) if (found := call(command)) is not None]
NAMED = re.compile(r"(configs|launch|benchmarks|tests|docs|data_tools|lime_dist)/[\w./-]*\w|pretrain\.py")
"""A path in the repository. One with ``NAME`` in it, such as a recipe's, stands for others."""
SECTIONS = {name for name, _ in sections() if name}


# -- what can be checked without running -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    """The help of every module and Python script that the pages call, by target and subcommand; made in one process."""
    wanted = sorted(
        {(found.target, found.subcommand) for _, found in CALLS if not found.target.endswith((".sh", ".sbatch"))}
    )
    script = (
        "import contextlib, io, json, runpy, sys, os\n"
        "texts, os._exit = {}, sys.exit\n"
        "for target, subcommand in json.loads(sys.argv[1]):\n"
        "    sys.argv = [target, *subcommand.split(), '--help']\n"
        "    if target.endswith('.py'): sys.path.insert(0, os.path.dirname(os.path.abspath(target)))\n"
        "    said = io.StringIO()\n"
        "    run = runpy.run_path if target.endswith('.py') else runpy.run_module\n"
        "    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit): run(target, run_name='__main__')\n"
        "    texts[f'{target} {subcommand}'] = said.getvalue()\n"
        "print(json.dumps(texts))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(wanted)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    texts: dict[str, str] = json.loads(finished.stdout)
    return texts


def test_flags_are_those_of_the_commands(help_texts: dict[str, str]) -> None:
    """Every module and script exists, and its help names every flag that a page gives it."""
    for command, found in CALLS:
        if found.target.endswith((".sh", ".sbatch")):
            lines = (ROOT / found.target).read_text().splitlines()
            text = "\n".join(line for line in lines if line.startswith("#"))
            text += "--help"
        else:
            text = help_texts[f"{found.target} {found.subcommand}"]
        assert text, f"{command}: no help"
        for flag in found.flags:
            assert re.search(rf"{flag}\b", text), f"{command}: no flag {flag}"
        for word in found.launcher[1:]:
            flag = word.partition("=")[0]
            assert not word.startswith("--") or flag in EXTERNAL_FLAGS[found.launcher[0]], f"{command}: no flag {flag}"


def test_overrides_and_yaml_blocks_are_valid() -> None:
    """Keys and values of ``section.key=value`` words, together with the configuration that the command reads."""
    described = {path: yaml.safe_load(text) for page in PAGES for path, text in yaml_files(page)}
    for page in PAGES:
        for _, text in yaml_files(page):
            make_config(yaml.safe_load(text), page.name)
    for command, found in CALLS:
        words = [found.option("--config"), *(word for word in found.arguments if word.endswith(".yaml"))]
        path = next((word for word in words if word is not None), None)
        if path in described:
            make_config(described[path], str(command))
            continue
        if path is None or path.startswith("work/"):
            path = "configs/quickstart.yaml"
        load_config(ROOT / path, found.overrides)


def test_extras_exist() -> None:
    """Those that ``pip install`` names."""
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for page in PAGES:
        for command in commands(page):
            if command.text.startswith("pip install"):
                extras = re.findall(r"\.\[([\w,]+)\]", command.text)
                assert {extra for group in extras for extra in group.split(",")} <= known, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    """Files that links, commands and code marks name, anchors, and configuration keys in code marks."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: no {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: no {target}"
    for text in [*code_marks(page), *(command.text for command in commands(page))]:
        for word in text.split():
            named = NAMED.fullmatch(word.strip("'\","))
            assert named is None or "NAME" in word or (ROOT / named[0]).exists(), f"{page.name}: no {word}"
    for text in code_marks(page):
        key = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?:=(.+))?", text)
        if key is None or key[1].split(".")[0] not in SECTIONS:
            continue
        name, _, leaf = key[1].rpartition(".")
        fields = dict(sections())[name].model_fields if name in SECTIONS else {}
        assert leaf in fields or key[1] in SECTIONS, f"{page.name}: no key {key[1]}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_the_changelog_and_the_citation_name_the_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version and citation["license"] == "Apache-2.0"
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# -- what runs -------------------------------------------------------------------------------------------------------

SMALL_RUN = (
    "model.hidden_size=32 model.intermediate_size=24 model.num_hidden_layers=4 model.num_attention_heads=4 "
    "data.sequence_length=64 train.steps=2 train.global_batch_size=4 train.micro_batch_size=4 train.evaluation_samples=4 "
    "train.evaluation_interval=0 train.checkpoint_interval=0 optimizer.warmup_steps=1 parallel.pipeline_stages=1"
)
INSTEAD = [
    (r"^(deepspeed|torchrun) .*pretrain\.py", "python pretrain.py"),
    (r"^(?:LIME_BACKEND=gloo )?bash launch/local\.sh (\S+) \d", r"python pretrain.py --config \1"),
    (r"^((?:WANDB_MODE=offline )?python pretrain\.py .*)", rf"\1 {SMALL_RUN}"),
    (r"hub:[\w/:-]+", "text"),
    (r"--vocab-size (32768|4096)", "--vocab-size 320"),
    (r"--workers 8", "--workers 1"),
    (r"(data_tools.pretokenize .*)", r"\1 --validation-fraction 0.1"),
    (r"--max-megabytes 10", "--max-megabytes 0.2"),
    (r"--documents 300000", "--documents 600"),
    (r"(tasks graph .*)", r"\1 --documents 20"),
    (r"(lime_dist.analysis .*)", r"\1 --words alpha,beta --samples 16"),
    (r"(lime_dist.generate .*)", r"\1 --max-new-tokens 4"),
    (r"--chunk-size 8", "--chunk-size 2"),
    (r"--processes 64 (.* --sweep)", r"--processes 8 \1"),
    (r"stable@8000", "stable@2"),
    (r"--profile=20-22", "--profile=2"),
]
"""What the test writes into a command before it runs it: a launcher of several processes becomes one process, a hub dataset
a local file, and sizes become small. The order matters: each replacement sees what those before it left."""
ONLY_CHECKED = [
    r"pip |source |tensorboard |python3 -m venv",
    r"bash launch/(gpu_check|quickstart|test)\.sh(?! --help)",  # they install; other tests and CI run them
    r"bash launch/evaluate_paper\.sh",  # needs the hub; tests/test_lm_eval.py runs its tasks
    r"bash launch/multinode\.sh (?!.*--dry-run)|sbatch |.*--hostfile hosts",  # need hosts; tests/cluster runs them
    r"python tests/cluster/bed\.py",  # needs root
]
"""Commands that this machine does not run, beyond the checks above."""

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau phi".split()
ONE_PROCESS = """
import json, os, runpy, shlex, sys
for text in json.loads(sys.argv[1]):
    print(f"$ {text}", file=sys.stderr, flush=True)
    words = shlex.split(text)
    sys.argv = words[2:]
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise
"""
"""Runs several ``python -m`` commands, so that they import torch and transformers once."""


@pytest.fixture(scope="module")
def trained(workers: Callable[[int], WorkerGroup], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that the pages take from earlier ones, a few steps long."""
    folder = tmp_path_factory.mktemp("runs")
    for name, architecture in (("quickstart", "lime"), ("quickstart-llama", "llama"), ("full", "lime")):
        values = run_values(dataset, folder / name, architecture=architecture)
        assert workers(1).run("support.runs.run", values=values) == [""]
    return folder


@pytest.fixture
def tree(tmp_path: Path, trained: Path, dataset: Path) -> Path:
    """A folder like the repository's, with what readers have before they come to a page; commands write into it."""
    for path in ROOT.iterdir():
        if path.name not in ("docs", "runs", "data", "work", "exported", "analysis", ".git"):
            (tmp_path / path.name).symlink_to(path)
    for name in ("docs", "runs", "data", "work", "text", "gpt2", "models"):
        (tmp_path / name).mkdir()
    for run in trained.iterdir():
        (tmp_path / "runs" / run.name).symlink_to(run)
    (tmp_path / "data/quickstart").symlink_to(dataset.parent)
    (tmp_path / "work/more-shards").symlink_to("shards")
    (tmp_path / "models/llama-1b").symlink_to("../exported/quickstart-llama")
    generator = random.Random(0)
    with (tmp_path / "text/documents.jsonl").open("w") as file:
        for _ in range(300):
            text = " ".join(generator.choice(WORDS) for _ in range(60))
            file.write(json.dumps({"text": text, "score": generator.uniform(2.5, 5)}) + "\n")
    return tmp_path


def prepare(tree: Path, page: Path, dataset: Path) -> None:
    """What single pages need beyond `tree`."""
    if page.name == "data.md":
        gpt_2().save(str(tree / "gpt2/tokenizer.json"))
        (tree / "gpt2/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    if page.name == "training.md":
        (tree / "work/shards").symlink_to(dataset)
    for path, text in yaml_files(page):
        if path:
            (tree / path).write_text(text)
    if page.name == "export.md":
        for name, model in (("task", {}), ("from-llama", {"architecture": "llama"})):
            values: dict[str, Any] = run_values(dataset, tree / "runs" / name, **model)
            (tree / f"work/{name}.yaml").write_text(yaml.safe_dump(values))


def is_only_checked(command: Command) -> bool:
    return any(re.match(pattern, command.text) for pattern in ONLY_CHECKED)


def shortened(command: Command) -> str:
    text = command.text
    for pattern, replacement in INSTEAD:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("CONTRIBUTING.md", "RESULTS.md")], ids=lambda page: page.name
)
def test_commands_run(page: Path, tree: Path, dataset: Path) -> None:
    """The commands of a page, in their order, with the replacements of `INSTEAD`."""
    prepare(tree, page, dataset)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tree / "modules"),
    }  # fmt: skip
    texts = dict.fromkeys(shortened(command) for command in commands(page) if not is_only_checked(command))
    for shares_process, group in groupby(
        texts, lambda text: re.fullmatch("python -m lime_dist[^>]*", text) is not None
    ):
        calls = [["bash", "-c", text] for text in group]
        if shares_process:
            calls = [[sys.executable, "-c", ONE_PROCESS, json.dumps([text for *_, text in calls])]]
        for words in calls:
            finished = subprocess.run(
                words, cwd=tree, env=environment, capture_output=True, text=True, timeout=240, check=False
            )
            assert finished.returncode == 0, f"{words[-1]}\n{finished.stdout[-2000:]}{finished.stderr[-3000:]}"
