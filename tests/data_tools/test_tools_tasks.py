"""Protects the synthetic tasks: right answers, distinct questions, the same bytes for the same seed, finished output kept."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from data_tools.tasks.__main__ import main
from data_tools.tasks.arithmetic import Arithmetic, reduce, write
from data_tools.tasks.documents import MARK, draw_documents
from data_tools.tasks.graph import Graph, make_names
from lime_dist.errors import LimeError

ROOT = Path(__file__).resolve().parents[2]


def value(expression: str) -> Fraction:
    """The value by Python's own rules, as a fraction."""
    result = eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})
    assert isinstance(result, Fraction)
    return result


@pytest.mark.parametrize(("operands", "largest"), [(2, 4), (4, 20), (7, 30)])
def test_every_step_has_the_value_of_the_question(operands: int, largest: int) -> None:
    operators = set()
    for document in itertools.islice(draw_documents(Arithmetic(operands, largest), 1), 20 if operands == 2 else 500):
        question, solution = document.split(MARK)
        steps = solution.split("=")
        assert len(re.findall(r"\d+", question)) == operands and steps[-1].isdecimal()
        assert {value(step) for step in [question, *steps]} == {Fraction(int(steps[-1]))}
        counts = [len(re.findall(r"\d+", step)) for step in [question, *steps]]
        assert counts == sorted(set(counts), reverse=True), "every step is shorter"
        assert max(int(number) for number in re.findall(r"\d+", document)) <= largest
        operators |= set(re.findall(r"[-+*/]", question))
    assert operators == set("+-*/")


def test_brackets_appear_only_where_needed() -> None:
    expression = ("-", ("-", 9, ("+", 1, 2)), ("*", ("/", 8, 2), ("-", 4, 3)))
    assert write(expression) == "9-(1+2)-8/2*(4-3)"
    assert write(reduce(expression)) == "9-3-4*1" and write(reduce(reduce(expression))) == "6-4"
    assert write(("/", 12, ("*", 2, 3))) == "12/(2*3)" and write(("*", ("*", 2, 3), 4)) == "2*3*4"


@pytest.mark.parametrize(("concepts", "hops"), [(4, 1), (8, 3), (14, 3), (30, 6)])
def test_one_chain_of_facts_gives_the_right_answer(concepts: int, hops: int) -> None:
    """Search the graph of the question: exactly one of the two concepts is reachable, by a single path, the solution."""
    first = 0
    for document in itertools.islice(draw_documents(Graph(concepts, hops, 40), 2), 100):
        question, solution = document.split(MARK)
        edges = re.findall(r"Every (\w+) is a (\w+)\.", question)
        assert len({name for edge in edges for name in edge}) == concepts and len(edges) == len(set(edges))
        ((person, root),) = re.findall(r"(\w+) is a (\w+)\.", re.sub(r"Every[^.]*\.", "", question))
        ((asked, one, other),) = re.findall(r"Is (\w+) a (\w+) or a (\w+)\?$", question)
        paths = {choice: find_paths(edges, root, choice) for choice in (one, other)}
        (right,) = [choice for choice in paths if paths[choice]]
        (path,) = paths[right]
        assert asked == person and len(path) == hops + 1
        facts = [f"Every {a} is a {b}." for a, b in itertools.pairwise(path)]
        assert solution.split("\n") == [f"{person} is a {root}.", *facts, f"{person} is a {right}."]
        assert all(fact in question for fact in facts)
        first += right == one
    assert 25 < first < 75, "either of the two may be right"


def find_paths(edges: list[tuple[str, str]], start: str, end: str) -> list[list[str]]:
    if start == end:
        return [[end]]
    return [[start, *path] for a, b in edges if a == start for path in find_paths(edges, b, end)]


def test_names_differ() -> None:
    """For the largest number of names allowed."""
    assert len(set(make_names(10_000))) == 10_000


@pytest.mark.parametrize("task", ["arithmetic", "graph"])
def test_the_same_seed_gives_the_same_bytes(task: str, tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main([task, "--output", str(tmp_path / name), "--documents", "300", "--seed", str(seed)])
        contents.append((tmp_path / name / "documents.jsonl").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    questions = [json.loads(line)["text"].split(MARK)[0] for line in contents[0].splitlines()]
    assert len(questions) == len(set(questions)) == 300


def test_another_process_writes_the_same(tmp_path: Path) -> None:
    """Independently of the seed of Python's string hashes."""
    main(["graph", "--output", str(tmp_path / "a"), "--documents", "20"])
    command = [sys.executable, "-m", "data_tools.tasks", "graph", "--output", str(tmp_path / "b"), "--documents", "20"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "a/documents.jsonl").read_bytes() == (tmp_path / "b/documents.jsonl").read_bytes()


def test_finished_documents_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["arithmetic", "--output", str(tmp_path), "--documents", "50"]
    main(given)
    before = (tmp_path / "documents.jsonl").read_bytes()
    main(given)
    assert "arithmetic complete, reused: 50 documents" in capsys.readouterr().out
    with pytest.raises(LimeError, match="holds documents with other settings; give another --output, or --fresh"):
        main([*given, "--operands", "5"])
    with pytest.raises(LimeError, match="little more than 8[0-9] different questions"):
        main([*given[:-1], "100000", "--fresh", "--operands", "2", "--largest", "8"])
    assert (tmp_path / "documents.jsonl").read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "documents.jsonl",
        "task.json",
    }
    (tmp_path / "documents.jsonl").write_bytes(before[:-9])
    main(given)
    assert (tmp_path / "documents.jsonl").read_bytes() == before
    (tmp_path / "task.json").unlink()
    with pytest.raises(LimeError, match="holds a documents.jsonl without task.json"):
        main(given)
    main([*given, "--fresh", "--operands", "5"])
    assert (tmp_path / "documents.jsonl").read_bytes() != before


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("arithmetic --operands 1", "--operands 1: must be from 2 to 64"),
        ("arithmetic --largest 3", "--largest 3: must be from 4 to 10000"),
        ("arithmetic --documents 0", "--documents 0: must be at least 1"),
        ("graph --seed -1", "--seed -1: must be at least 0"),
        ("graph --hops 0", "--hops 0: must be from 1 to 64"),
        ("graph --names 11", "--names 11: must be from --concepts 12 to 10000"),
        ("graph --concepts 9 --hops 4", "--concepts 9: must be from 10 (two chains of --hops 4 facts) to 256"),
    ],
)
def test_mistakes_are_one_line_errors(given: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(LimeError, match=re.escape(line)):
        main([*given.split(), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_with_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_tools.tasks", "graph", "--output", str(tmp_path), "--hops", "0"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (2, "error: --hops 0: must be from 1 to 64\n")
