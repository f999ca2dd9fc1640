"""Protects what the engines need of DeepSpeed and torch: after an upgrade, a name that is missing or has changed fails here."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest
import torch

from lime_dist import contract, pipeline
from lime_dist.contract import ATTRIBUTE, CLASS, INSTANCE, NAMES, PROPERTY, Entries, unsupported
from lime_dist.errors import LimeError
from lime_dist.pipeline.engine import LimeEngine, PipelineEngine
from lime_dist.pipeline.stage_schedule import CLASSES

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "pretrain.py", *sorted((ROOT / "lime_dist").rglob("*.py"))]
PYTHON = {"os._exit"}
"""Underscored names of the standard library."""


def resolve(path: str) -> Any:
    """Return the module, class or function with this dotted path."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            value = getattr(value, name)
        return value
    raise AssertionError(f"{path} does not exist")


@cache
def tree_of(owner: type) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(owner)))


def loaded(owner: type) -> set[str]:
    """Return the names that the methods of a class read from ``self``."""
    return {node.attr for node in of_self(owner) if isinstance(node.ctx, ast.Load)}


def stored(owner: type) -> set[str]:
    """Return the names that the methods of a class assign to ``self``, including annotations and ``self.__dict__[...] = ...``."""
    subscripts = (node for node in ast.walk(tree_of(owner)) if isinstance(node, ast.Subscript))
    entries = {
        node.slice.value
        for node in subscripts
        if isinstance(node.slice, ast.Constant) and ast.unparse(node.value) == "self.__dict__"
    }
    return (
        {node.attr for node in of_self(owner) if isinstance(node.ctx, ast.Store)}
        | entries
        | set(inspect.get_annotations(owner))
    )


def of_self(owner: type) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree_of(owner)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node


def bases(owner: type, *packages: str) -> list[type]:
    """Return those of a class and its bases that these packages define."""
    return [base for base in owner.__mro__ if base.__module__.split(".")[0] in packages]


def names_of(owner: type, *packages: str) -> set[str]:
    """Return the names that these packages define for a class and its instances."""
    classes = bases(owner, *packages)
    return {name for base in classes for name in {*vars(base), *stored(base)}}


def parameters(function: Any) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    if isinstance(function, torch._ops.OpOverloadPacket):
        function = function.default
    if isinstance(function, torch._ops.OpOverload):
        return [argument.name for argument in function._schema.arguments]
    return [stars.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values()]


def problem_of(owner: Any, name: str, expected: str) -> str:
    """Describe how a name differs from the contract; empty if it does not."""
    if expected == INSTANCE:
        missing = not any(name in stored(base) for base in bases(owner, "deepspeed", "torch"))
        return "no method assigns it" if missing else ""
    if isinstance(owner, torch._ops._OpNamespace):
        getattr(owner, name, None)  # operations are made when they are asked for
    try:
        actual = inspect.getattr_static(owner, name)
    except AttributeError:
        return "does not exist"
    if expected in (ATTRIBUTE, PROPERTY, CLASS):
        fits = {
            ATTRIBUTE: not callable(actual),
            PROPERTY: isinstance(actual, property),
            CLASS: isinstance(actual, type),
        }
        return "" if fits[expected] else f"is no {expected}"
    if not callable(actual) and not isinstance(owner, type):
        actual = getattr(owner, name)
    if not callable(actual):
        return f"has no signature; expected {expected}"
    wanted = expected.strip("()").split(", ") if expected != "()" else []
    has = parameters(actual)
    if "..." in wanted:
        others = iter(has)
        return "" if all(one in others for one in wanted if one != "...") else f"has the parameters {has}"
    return "" if has == wanted else f"has the parameters {has}"


def broken(names: Mapping[str, Entries]) -> list[str]:
    """Return a line for every name of a contract that the installed libraries do not keep."""
    return [
        f"{path}.{name}: {problem}"
        for path, entries in names.items()
        for name, (expected, _) in entries.items()
        if (problem := problem_of(resolve(path), name, expected))
    ]


@cache
def derived_classes() -> list[type]:
    """Return the classes of lime_dist.pipeline that derive from one of DeepSpeed's."""
    modules = [import_module(one.name) for one in walk_packages(pipeline.__path__, "lime_dist.pipeline.")]
    return [
        value
        for part in modules
        for value in vars(part).values()
        if isinstance(value, type) and value.__module__ == part.__name__ and bases(value, "deepspeed")
    ]


def agreed(owner: type) -> set[str]:
    """Return the names that the contract lists for a class or its bases."""
    return {name for path, entries in NAMES.items() if resolve(path) in owner.__mro__ for name in entries}


def test_the_libraries_keep_every_name() -> None:
    assert broken(NAMES) == []
    assert all(reason for entries in NAMES.values() for _, reason in entries.values())


@pytest.mark.parametrize(
    ("path", "name", "expected", "problem"),
    [
        ("deepspeed.runtime.pipe.engine.PipelineEngine", "_exec_forward", "(self, buffer_id)", "does not exist"),
        ("deepspeed.runtime.pipe.engine.PipelineEngine", "_exec_forward_pass", "(self)", "has the parameters"),
        ("deepspeed.runtime.pipe.engine.PipelineEngine", "gradient_layer", INSTANCE, "no method assigns it"),
        ("deepspeed.runtime.pipe.engine.PipelineEngine", "is_first_stage", PROPERTY, "is no property"),
        ("deepspeed.runtime.pipe.module.TiedLayerSpec", "__init__", "(self, name, ...)", "has the parameters"),
        ("torch.ops.aten.mm", "dtype", "(self, mat2, dtype)", "has the parameters"),
        ("torch.ops.aten", "_scaled_dot_product_flash_attention", "(query, key, value)", "has the parameters"),
        ("torch.ops.aten", "_scaled_dot_product_attention_of_old", "(query, key, value)", "does not exist"),
        ("torch.distributed", "get_rank", CLASS, "is no class"),
    ],
)
def test_a_name_that_has_changed_is_found(path: str, name: str, expected: str, problem: str) -> None:
    (line,) = broken({path: {name: (expected, "a test")}})
    assert line.startswith(f"{path}.{name}: {problem}")


def test_every_override_is_in_the_contract() -> None:
    """In both directions: if an upgrade used a name of ours, DeepSpeed would call it."""
    for owner in derived_classes():
        ours = names_of(owner, "lime_dist") - {
            "__module__",
            "__doc__",
            "__annotations__",
            "__abstractmethods__",
            "_abc_impl",
        }
        theirs = names_of(owner, "deepspeed", "torch")
        assert (ours & theirs) - {"__init__"} <= agreed(owner), owner


def test_every_hook_is_still_called() -> None:
    """Overriding a private method has an effect only if DeepSpeed calls it, directly or by its instruction."""
    called = {method.__name__ for method in PipelineEngine._INSTRUCTION_MAP.values()}
    for owner in derived_classes():
        called |= {name for base in bases(owner, "deepspeed") for name in loaded(base)}
    for owner in derived_classes():
        hooks = {name for name in agreed(owner) if name in names_of(owner, "lime_dist") and re.match(r"_[^_]", name)}
        assert hooks <= called, owner


def test_the_instructions_are_those_that_the_engines_know() -> None:
    """Each engine maps every stock instruction; a method that we replace is the stock map's for the same instruction, but may also
    take the part of the stage. Ours are instructions of schedules."""
    stock = PipelineEngine._INSTRUCTION_MAP
    engines = [owner for owner in derived_classes() if issubclass(owner, LimeEngine)]
    assert len(engines) >= 2
    for owner in engines:
        assert set(stock) <= set(owner._INSTRUCTION_MAP) <= {*stock, *CLASSES.values()}
        for instruction in stock:
            method = owner._INSTRUCTION_MAP[instruction]
            assert method.__name__ == stock[instruction].__name__
            assert [name for name in parameters(method) if name != "part"] == parameters(stock[instruction])


def test_what_the_engines_read_is_in_the_contract() -> None:
    for owner in derived_classes():
        read = loaded(owner) - names_of(owner, "lime_dist") - {"parameters"}
        assert read <= agreed(owner), owner


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return the underscored names that code reads from an object or imports, with their lines, except __names__."""
    python = {*dir(type), *dir(tree_of), "__path__", "__file__", "__version__"}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr] if ast.unparse(node) not in PYTHON else []
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr")
        ):
            names = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        yield from ((node.lineno, name) for name in names if name.startswith("_") and name not in python)


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Return the underscored names that code defines or assigns itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_no_private_name_is_used_without_a_contract() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    known = {name for entries in NAMES.values() for name in entries}
    known |= {name for tree in trees.values() for name in defined_names(tree)}
    strangers = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in private_names(tree)
        if name not in known
    ]
    assert strangers == []


def test_a_private_name_is_found() -> None:
    text = "import torch._dynamo\nfrom torch._C import x\ny = engine._config\ngetattr(z, '_backward_hooks')\nw.__compatible_ops__"
    names = [name for _, name in private_names(ast.parse(text))]
    assert sorted(names) == ["_C", "__compatible_ops__", "_backward_hooks", "_config", "_dynamo"]


def test_the_contract_has_no_name_that_nobody_uses() -> None:
    text = "\n".join(path.read_text() for path in SOURCES if path.name != "contract.py")
    text += inspect.getsource(contract.disable_compiled_operations)
    for path, entries in NAMES.items():
        for name in entries:
            word = "out_dtype" if path == "torch.ops.aten.mm" else name
            assert re.search(rf"\b{word}\b", text), f"{path}.{name}"


def test_losing_a_peer_is_a_runtime_error() -> None:
    assert issubclass(torch.distributed.DistError, RuntimeError)


def test_the_state_of_adamw() -> None:
    """Checkpoints hold it, and the optimizer allocates it before the first step."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    adam = torch.optim.AdamW([weight], fused=True)
    adam.step()
    assert {name: state.dtype for name, state in adam.state[weight].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), torch.float32
    )


def test_the_versions_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    pinned = (ROOT / "constraints.txt").read_text()
    for package, supported in contract.SUPPORTED.items():
        (given,) = re.findall(rf'"{package}([<>=][^"]*)"', text)
        assert contract.SpecifierSet(given) == supported
        (version,) = re.findall(rf"^{package}==(.+)$", pinned, re.MULTILINE)
        assert unsupported(package, version) == "" and f"{version}" in (contract.__doc__ or "")


@pytest.mark.parametrize(
    ("package", "version", "reason"),
    [
        ("torch", "2.13.0+cpu", ""),
        ("torch", "2.9.0a0+git1234567", ""),
        ("torch", "2.7.1", "lime_dist needs torch>=2.8"),
        ("deepspeed", "0.19.3", ""),
        ("deepspeed", "0.19.2", "0.18.3 to 0.19.2 scale gradients wrongly or hang under pipelines"),
        ("deepspeed", "0.18.3", "0.18.3 to 0.19.2 scale gradients wrongly or hang under pipelines"),
        ("deepspeed", "0.18.2", "lime_dist needs deepspeed<0.20,>=0.19.3"),
        ("deepspeed", "0.20.0", "lime_dist needs deepspeed<0.20,>=0.19.3"),
        ("deepspeed", "not installed", ""),
    ],
)
def test_versions(package: str, version: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the doctor says about versions, and which ones stop a run at its start."""
    from lime_dist.distributed import check_versions

    line = unsupported(package, version)
    assert line == (f"{reason}; pip install -c constraints.txt {package}" if reason else "")
    installed = {"torch": "2.13.0", "deepspeed": "0.19.8"} | {package: version}
    monkeypatch.setattr("importlib.metadata.version", installed.__getitem__)
    if reason:
        with pytest.raises(LimeError, match=re.escape(f"{package} {version} is installed; {reason}")):
            check_versions()
    else:
        check_versions()
