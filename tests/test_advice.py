"""Protects what messages advise: every flag and every configuration key that the program's texts name exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.tokenizer.importing import USUAL_NAMES
from lime_dist.config.page import sections

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "pretrain.py", *sorted(ROOT.glob("lime_dist/**/*.py")), *sorted(ROOT.glob("data_tools/**/*.py"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
KEY = re.compile(
    rf"(?<![\w./])(?:{'|'.join(name for name, _ in sections() if name and '.' not in name)})(?:\.[a-z_]+)+"
)
OTHER_PROGRAMS = {
    "--help": "", "--logdir": "tensorboard", "--master_addr": "launcher",
    **dict.fromkeys(("--num_gpus", "--master_port", "--include", "--force_multi"), "deepspeed"),
}  # fmt: skip
"""Flags of other programs, or of every parser, with a word that stands beside them."""
OTHER_NAMES = (
    "model.layers",
    "model.embed_tokens",
    "model.norm",
    "model.history.chunks",
    "model.safetensors",
    "model.generate",
)
"""Names of an exported model's parameters, files and methods, which look like keys."""
LIBRARY = ("data", "model", "monitor", "pipeline", "train")
"""Packages of lime_dist that pretrain.py uses: a flag in their texts is another command's, which must be named."""


def texts(source: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the strings of a module except docstrings; what an f-string inserts is {}."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
            parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def added_flags(source: Path) -> set[str]:
    """The flags that a module gives to a parser."""
    calls = (node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {word.value for call in added for word in call.args if isinstance(word, ast.Constant)}


def has_key(dotted: str) -> bool:
    """Whether a key, or a section, exists."""
    return dotted in {name for name, _ in sections()} or any(
        dotted == (f"{name}.{key}" if name else key) for name, section in sections() for key in section.model_fields
    )


def flag_problem(source: Path, text: str, flags: set[str]) -> str | None:
    """What is wrong with the flags that a text names."""
    for flag in FLAG.findall(text):
        if flag in OTHER_PROGRAMS and OTHER_PROGRAMS[flag] in text:
            continue
        if flag not in flags:
            return f"there is no {flag}"
        place = source.relative_to(ROOT).parts
        if (
            place[0] == "lime_dist"
            and place[1] in LIBRARY
            and not re.search(r"(data_tools|lime_dist)\.\w+|pretrain\.py", text)
        ):
            return f"{flag} of which command?"
    return None


def test_flags_and_keys_in_messages_exist() -> None:
    flags = set().union(*map(added_flags, SOURCES)) | {f"--{name}" for name in USUAL_NAMES}
    problems = []
    for source in SOURCES:
        if source.name == "synonyms.py":  # other programs' keys
            continue
        for line, text in texts(source):
            where = f"{source.relative_to(ROOT)}:{line}"
            if re.fullmatch(r"--[\w-]+", text) is None and (problem := flag_problem(source, text, flags)) is not None:
                problems.append(f"{where}: {problem}")
            problems += [
                f"{where}: there is no key {key}"
                for key in KEY.findall(text)
                if not key.startswith(OTHER_NAMES) and not has_key(key)
            ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("place", "text", "says"),
    [
        ("lime_dist/data/a.py", "give a larger --validation-fraction", "--validation-fraction of which command?"),
        ("lime_dist/data/a.py", "give data_tools.pretokenize a larger --validation-fraction", None),
        ("data_tools/a.py", "give a larger --validation-fraction", None),
        ("data_tools/a.py", "give a larger --validation-split", "there is no --validation-split"),
    ],
)
def test_advice_without_its_command_is_seen(place: str, text: str, says: str | None) -> None:
    assert flag_problem(ROOT / place, text, {"--validation-fraction"}) == says


def test_keys_are_told_from_other_dotted_names() -> None:
    assert KEY.findall(
        "set data.validation_fraction or model.lime.history.policy; lime_dist.data.files, a/data.csv"
    ) == [
        "data.validation_fraction",
        "model.lime.history.policy",
    ]
    assert has_key("data.validation_fraction") and has_key("model.lime.history") and not has_key("data.validations")
