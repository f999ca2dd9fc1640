"""Protects exact match: it tells right from wrong solutions, prompts are as in training, and mistakes give one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.exports import write_random
from support.tasks import make_shards, task_values

from data_tools.tasks.documents import MARK
from data_tools.tokenizer import Tokenizer
from lime_dist import exact_match
from lime_dist.checkpoint import export
from lime_dist.errors import LimeError
from lime_dist.export.exported import ExportedModel

pytest.importorskip("transformers", reason="the extra `hf` is not installed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def exported(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights."""
    folder = tmp_path_factory.mktemp("model")
    write_random(task_values(shards, folder / "run"))
    export.main(["--checkpoint", str(folder / "run"), "--output", str(folder / "out")])
    return folder / "out"


class Stub:
    """Generates what a function of the prompt returns, token by token, then eos; keeps its position in the cache."""

    device = torch.device("cpu")

    def __init__(self, says: Callable[[list[int]], list[int]], eos: int) -> None:
        self.says, self.eos, self.prompts = says, eos, list[list[int]]()

    def __call__(self, tokens: torch.Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
        if past_key_values is None:
            self.prompts += tokens.tolist()
            past_key_values = ([[*self.says(prompt), self.eos] for prompt in tokens.tolist()], 0)
        rows, place = past_key_values
        logits = torch.zeros(len(rows), 1, 300)
        for row, ids in enumerate(rows):
            logits[row, 0, ids[min(place, len(ids) - 1)]] = 1
        return SimpleNamespace(logits=logits, past_key_values=(rows, place + 1))


def ask(shards: Path, change: Callable[[str, int], str]) -> tuple[exact_match.Score, list[list[int]], Tokenizer]:
    """Score a model that gives each question's solution after ``change(solution, index)``."""
    tokenizer = Tokenizer(shards / "tokenizer")
    mark = tokenizer.facts["symbols"][MARK]
    questions = exact_match.read_questions(shards, "validation", mark, tokenizer.eos_id, tokenizer.bos_id, 30)
    solutions = {
        tuple(q.prompt): tokenizer.encode(change(tokenizer.decode(q.solution), i)).tolist()
        for i, q in enumerate(questions)
    }
    stub = Stub(lambda prompt: solutions[tuple(prompt)], tokenizer.eos_id)
    decoder = SimpleNamespace(decode=lambda ids, skip_special_tokens=False: tokenizer.decode(ids))
    model = ExportedModel(shards, {}, stub, decoder)
    return exact_match.score(model, questions, tokenizer.eos_id, 4), stub.prompts, tokenizer


def test_right_solutions_count_and_wrong_ones_do_not(shards: Path) -> None:
    """Every third solution reaches its answer another way, every fifth has another answer."""

    def change(solution: str, number: int) -> str:
        changed = "7=" + solution if number % 3 == 0 else solution
        return changed + "0" if number % 5 == 0 else changed

    score, prompts, tokenizer = ask(shards, change)
    assert (score.questions, score.exact, score.final) == (30, 16, 24) and len(score.wrong) == 14
    assert all(wrong.actual != wrong.expected and wrong.question.endswith(MARK) for wrong in score.wrong)
    assert all(prompt[0] == tokenizer.eos_id and prompt.count(tokenizer.eos_id) == 1 for prompt in prompts)
    assert ask(shards, lambda solution, _: solution)[0].exact == 30


def test_a_solution_that_does_not_end_is_cut_off_and_wrong(shards: Path) -> None:
    score, *_ = ask(shards, lambda solution, _: solution + "=1" * 500)
    assert score.exact == 0 and max(len(wrong.actual) for wrong in score.wrong) < 200


def test_a_final_answer_follows_the_last_sign_or_line_break() -> None:
    assert exact_match.final_answer("4+16/2=4+8=12") == "12" and exact_match.final_answer("3") == "3"
    assert exact_match.final_answer("Eva is a bo.\nEvery bo is a ru.\nEva is a ru.") == "Eva is a ru."


def test_the_interval_is_wilsons() -> None:
    """The ends solve (p − s)² = z² p (1 − p) / n for the share s."""
    for count, trials in ((0, 20), (3, 20), (500, 1000), (20, 20)):
        for end in exact_match.wilson(count, trials):
            distance = (end - count / trials) ** 2
            assert distance == pytest.approx(1.959964**2 * end * (1 - end) / trials, abs=1e-12)
        low, high = exact_match.wilson(count, trials)
        assert 0 <= low <= count / trials <= high <= 1 and not math.isclose(low, high)


def test_answers_with_a_cache_are_those_of_whole_rows(exported: Path, shards: Path) -> None:
    """The real model, with prompts one by one and in a batch."""
    from lime_dist.export.exported import open_export

    model = open_export(exported).model
    prompts = torch.tensor([[2, 10, 20, 5], [2, 30, 7, 5], [2, 11, 12, 5]])
    answers = exact_match.answer(model, prompts, -1, 12)
    for prompt, ids in zip(prompts, answers, strict=True):
        row = prompt.tolist()
        for _ in range(12):
            with torch.no_grad():
                row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        assert ids == row[4:] == exact_match.answer(model, prompt[None], -1, 12)[0]


def test_the_command(exported: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", str(exported), "--data", str(shards)]
    exact_match.main([*command, "--samples", "20", "--show", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"20 validation documents of {shards}"
    assert lines[1] == "whole solution correct: 0, 0.00% (95 % interval 0.00% to 16.11%)"
    assert [line.split(":")[0] for line in lines[3::3]] == ["question", "question"]
    exact_match.main([*command, "--json", "--split", "train", "--samples", "0"])
    numbers = json.loads(capsys.readouterr().out)
    documents = json.loads((shards / "dataset.json").read_text())["splits"]["train"]["shards"][0]["documents"]
    assert (
        numbers["questions"] == documents and numbers["exact"]["count"] == 0 and len(numbers["final"]["interval"]) == 2
    )


def test_mistakes_are_one_line(exported: Path, shards: Path, dataset: Path, tmp_path: Path) -> None:
    def line(*options: str, model: Path = exported, data: Path = shards) -> str:
        with pytest.raises(LimeError) as caught:
            exact_match.main(["--model", str(model), "--data", str(data), *options])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert line("--samples", "-1") == "--samples -1: must be at least 0"
    assert line("--batch-size", "0") == "--batch-size 0: must be at least 1"
    assert "no split 'test'; it has train, validation" in line("--split", "test")
    assert "was tokenized with another tokenizer" in line(data=dataset)
    assert "no document of split 'validation' contains the token 250" in line("--answer-token", "250")
    plain = task_values(shards, tmp_path / "run")
    plain["data"]["answer_token"] = None
    write_random(plain)
    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert "was trained without data.answer_token; pass the id of the mark as --answer-token" in line(
        model=tmp_path / "out"
    )
    certificate = tmp_path / "out/certificate.json"
    values = json.loads(certificate.read_text())
    values["training"] |= {"answer_token": 250, "eos_token": 7}
    certificate.write_text(json.dumps(values))
    assert line(model=tmp_path / "out").startswith("data.eos_token=7, but the documents of ")
