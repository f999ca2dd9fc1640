"""Protects the direction of imports: a package knows what lies below it and nothing above.

All imports count, also those inside functions and under ``TYPE_CHECKING``. Registries (`lime_dist.config.registry`) find their
packages by name, which does not count as an import. A command module, which ends in ``run_command(main)``, may import anything;
only tests import it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for package in ("lime_dist", "data_tools") for path in sorted((ROOT / package).rglob("*.py"))]

ALLOWED: dict[str, str] = {
    "lime_dist": "config model",
    "lime_dist.errors": "",
    "lime_dist.commands": "",
    "lime_dist.contract": "",
    "lime_dist.paths": "errors",
    "lime_dist.launchers": "errors",
    "lime_dist.rendezvous": "errors hostfile",
    "lime_dist.hostfile": "",
    "lime_dist.host_staging": "",
    "lime_dist.versions": "",
    "lime_dist.distributed": "errors contract host_staging launchers rendezvous",
    "lime_dist.config": "errors paths",
    "lime_dist.data": "errors distributed config",
    "lime_dist.model": "errors config",
    "lime_dist.pipeline": "errors distributed contract config data model",
    "lime_dist.train": "errors launchers distributed config data model pipeline",
    "lime_dist.checkpoint": "errors launchers distributed config data model",
    "lime_dist.monitor": "errors launchers versions config data model checkpoint",
    "lime_dist.export": "errors config data model checkpoint data_tools",
    "lime_dist.plan": "errors config data model pipeline",
    "lime_dist.doctor": "errors versions hostfile distributed contract config data model pipeline plan checkpoint export",
    "lime_dist.analysis": "errors config data model checkpoint monitor export",
    "data_tools": "errors commands paths data",
}
"""What the files of a package may import: packages and modules of `lime_dist` by their short names, and `data_tools`. Its own
files are always allowed, and so is `lime_dist` itself, for the version."""

KNOWS_ALL = {
    "lime_dist/train/loop.py": "checkpoint monitor",
}
"""Files that may import more than their package: the training loop uses checkpoints and the monitor."""


def is_command(path: Path) -> bool:
    """Return whether a file calls ``run_command(main)``, as commands do when they are run."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == "run_command" for call in calls)


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}
COMMANDS = {module for module, path in MODULES.items() if is_command(path)}


def package_of(module: str) -> str:
    """Return the key of `ALLOWED` that a module belongs to."""
    return max((key for key in ALLOWED if f"{module}.".startswith(f"{key}.")), key=len)


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the modules of this project that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                alias.name for alias in node.names if alias.name.partition(".")[0] in ("lime_dist", "data_tools")
            )
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # modelling code, which exports carry, imports its neighbours like this
                assert node.level == 1, f"{path}: an import from outside its folder must be absolute"
                continue
            if str(node.module).partition(".")[0] in ("lime_dist", "data_tools"):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    yield name if name in MODULES else str(node.module)


def violations() -> set[tuple[str, str]]:
    """Return (file, imported module) for every import that the rules forbid."""
    wrong = set()
    for path in SOURCES:
        file, package = str(path.relative_to(ROOT)), package_of(module_of(path))
        names = f"{ALLOWED[package]} {KNOWS_ALL.get(file, '')}".split()
        allowed = {name if name == "data_tools" else f"lime_dist.{name}" for name in names} | {package, "lime_dist"}
        for imported in imported_modules(path):
            commands = imported in COMMANDS
            above = package_of(imported) not in allowed and module_of(path) not in COMMANDS
            if commands or above:
                wrong.add((file, imported))
    return wrong


def test_imports_point_one_way() -> None:
    assert violations() == set()


def test_every_package_has_a_rule() -> None:
    """A file or folder at the top of `lime_dist` is a command or has a row in the table."""
    tops = {".".join(module.split(".")[:2]) for module in MODULES if module.startswith("lime_dist")}
    assert {top for top in tops - ALLOWED.keys() if top not in COMMANDS} == set()
    assert {key for key in ALLOWED if key not in tops | {"data_tools"}} == set()
    short = {key.removeprefix("lime_dist.") for key in ALLOWED}
    assert all(name in short for names in (*ALLOWED.values(), *KNOWS_ALL.values()) for name in names.split())
    assert all((ROOT / file).is_file() for file in KNOWS_ALL)


def test_the_table_has_no_circle() -> None:
    """Removing, again and again, the packages that import none of the rest leaves nothing."""
    left = {key: {f"lime_dist.{name}" for name in names.split()} & ALLOWED.keys() for key, names in ALLOWED.items()}
    while left:
        lowest = {key for key, names in left.items() if not names & left.keys()}
        assert lowest, f"these import each other: {sorted(left)}"
        left = {key: names for key, names in left.items() if key not in lowest}


def test_imports_in_functions_and_under_type_checking_count(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lime_dist.train.run import Run\n"
        "def f():\n    import lime_dist.monitor.console\n    from lime_dist.checkpoint import store, nothing\n"
    )
    assert set(imported_modules(path)) == {
        "lime_dist.train.run", "lime_dist.monitor.console", "lime_dist.checkpoint.store", "lime_dist.checkpoint",
    }  # fmt: skip
