"""Let an exported model answer the questions of a split; count solutions that equal the document's token by token, and equal final
answers."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lime_dist.commands import CommandParser
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lime_dist.export.exported import ExportedModel

EXAMPLE = """example:
  python -m lime_dist.exact_match --model exported/arithmetic --data data/arithmetic/shards --show 3"""

LONGER = 2
"""Solutions are cut off at this multiple of the longest reference solution of the batch."""


@dataclass(frozen=True)
class Question:
    """A document split at the mark: the ids up to it, which the model gets, and the ids after it, without eos."""

    prompt: list[int]
    solution: list[int]


@dataclass(frozen=True)
class Wrong:
    """A question with a wrong solution."""

    question: str
    expected: str
    actual: str


@dataclass(frozen=True)
class Score:
    """Number of questions, of equal solutions and of equal final answers, and the wrong solutions."""

    questions: int
    exact: int
    final: int
    wrong: list[Wrong]

    def summary(self) -> dict[str, Any]:
        """Counts and shares with their 95 % intervals."""
        shares = {
            name: {"count": count, "share": count / self.questions, "interval": wilson(count, self.questions)}
            for name, count in (("exact", self.exact), ("final", self.final))
        }
        return {"questions": self.questions, **shares}


def wilson(count: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    centre, spread = count + z * z / 2, z * math.sqrt(count * (trials - count) / trials + z * z / 4)
    low, high = ((centre + side * spread) / (trials + z * z) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def final_answer(solution: str) -> str:
    """The text after the last ``=`` or line break."""
    return re.split("[=\n]", solution)[-1]


def read_questions(
    data: Path, split: str, mark: int, eos: int, bos: int, samples: int, document_mask: bool = False
) -> list[Question]:
    """The first ``samples`` documents of a split that contain the mark; 0: all.

    Args:
        document_mask: whether documents did not see each other in training.

    Raises:
        LimeError: no document contains it.
    """
    questions: list[Question] = []
    for document in _documents(data, split):
        ids = document.tolist()
        if mark not in ids:
            continue
        place = ids.index(mark) + 1
        # In training, a document without bos follows the eos of another one, which it sees without a document mask.
        begin = [] if ids[0] == bos or document_mask else [eos]
        solution = ids[place:-1] if ids[-1] == eos else ids[place:]
        questions.append(Question([*begin, *ids[:place]], solution))
        if len(questions) == samples:
            break
    if not questions:
        raise LimeError(
            f"{data}: no document of split {split!r} contains the token {mark} (data.answer_token of the run)"
        )
    return questions


def _documents(data: Path, split: str) -> Iterator[np.ndarray]:
    from lime_dist.data.dataset import read_dataset_json
    from lime_dist.data.indexed import IndexedDataset

    for shard in read_dataset_json(data)["splits"][split]["shards"]:
        documents = IndexedDataset(data / shard["name"])
        for i in range(len(documents)):
            yield documents.document(i)


def answer(model: Any, prompts_BT: torch.Tensor, eos: int, limit: int) -> list[list[int]]:
    """Generate greedily with a key/value cache, up to eos (left out) or ``limit`` tokens."""
    import torch

    rows: list[torch.Tensor] = []
    tokens, cache = prompts_BT, None
    ended = torch.zeros(len(prompts_BT), dtype=torch.bool, device=prompts_BT.device)
    with torch.no_grad():
        while len(rows) < limit and not ended.all():
            output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            rows.append(tokens)
            ended |= tokens[:, 0] == eos
    solutions = torch.cat(rows, 1).tolist()
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in solutions]


def score(exported: ExportedModel, questions: Sequence[Question], eos: int, batch_size: int) -> Score:
    """Answer all questions and count. Prompts of different lengths do not share a batch: padding could decide a near tie."""
    import torch

    from data_tools.common import progress_bar

    by_length: defaultdict[int, list[Question]] = defaultdict(list)
    for question in questions:
        by_length[len(question.prompt)].append(question)
    exact = final = 0
    wrong: list[Wrong] = []
    decode = exported.tokenizer.decode
    with progress_bar(len(questions), "answers", unit=" questions") as bar:
        for alike in by_length.values():
            for start in range(0, len(alike), batch_size):
                batch = alike[start : start + batch_size]
                prompts = torch.tensor([question.prompt for question in batch], device=exported.model.device)
                limit = LONGER * (max(len(question.solution) for question in batch) + 1)
                for question, solution in zip(batch, answer(exported.model, prompts, eos, limit), strict=True):
                    if solution == question.solution:
                        exact, final = exact + 1, final + 1
                        continue
                    expected, actual = decode(question.solution), decode(solution)
                    final += final_answer(expected) == final_answer(actual)
                    wrong.append(Wrong(decode(question.prompt, skip_special_tokens=True), expected, actual))
                bar.update(len(batch))
    return Score(len(questions), exact, final, wrong)


def exact_match(
    model: Path, data: Path, split_name: str, samples: int, answer_token: int | None, batch_size: int
) -> Score:
    """Score an export on the documents of a split.

    Args:
        samples: number of documents with an answer, from the first on; 0: all.
        answer_token: id of the mark; None: the one that the run was trained with.

    Raises:
        LimeError: the model or the data cannot be read or do not match, or the mark is unknown.
    """
    for flag, value, least in (("--samples", samples, 0), ("--batch-size", batch_size, 1)):
        if value < least:
            raise LimeError(f"{flag} {value}: must be at least {least}")
    from lime_dist.data.answers import find_answers
    from lime_dist.data.dataset import TokenSplit, read_dataset_json
    from lime_dist.export.exported import check_vocabulary, open_verified, verify

    certificate = verify(model)
    split = TokenSplit(data, split_name)
    check_vocabulary(certificate, model, split)
    training = certificate["training"]
    mark = training.get("answer_token") if answer_token is None else answer_token
    answers = find_answers(split, mark, training.get("eos_token"))
    if answers is None:
        raise LimeError(f"{model}: was trained without data.answer_token; pass the id of the mark as --answer-token")
    bos = read_dataset_json(data).get("bos_id", -1)
    masked = bool(training.get("document_mask"))
    questions = read_questions(data, split_name, answers.mark, answers.eos, bos, samples, masked)
    return score(open_verified(model, certificate), questions, answers.eos, batch_size)


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.exact_match``."""
    parser = CommandParser(
        prog="python -m lime_dist.exact_match",
        description=__doc__,
        epilog=EXAMPLE,
    )
    parser.add_argument("--model", required=True, type=user_path, help="the --output of lime_dist.checkpoint.export")
    parser.add_argument("--data", required=True, type=user_path, help="folder of shards with the model's tokenizer")
    parser.add_argument("--split", default="validation", help="default: validation")
    parser.add_argument(
        "--samples", type=int, default=1000, help="number of documents, from the first on (default 1000; 0: all)"
    )
    parser.add_argument(
        "--answer-token", type=int, help="id of the mark between question and answer (default: the run's)"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="questions per batch (default 256)")
    parser.add_argument("--show", type=int, default=0, metavar="K", help="print the first K wrong solutions")
    parser.add_argument("--json", action="store_true", help="print only the numbers, as JSON")
    options = parser.parse_args(arguments)
    given = (options.model, options.data, options.split, options.samples, options.answer_token, options.batch_size)
    result = exact_match(*given)
    if options.json:
        print(json.dumps(result.summary()))
        return
    print(f"{result.questions:,} {options.split} documents of {options.data}")
    for name, label in (("exact", "whole solution"), ("final", "final answer")):
        one = result.summary()[name]
        low, high = one["interval"]
        print(f"{label} correct: {one['count']:,}, {one['share']:.2%} (95 % interval {low:.2%} to {high:.2%})")
    for wrong in result.wrong[: max(0, options.show)]:
        print(f"question: {wrong.question}\nexpected: {wrong.expected}\nactual:   {wrong.actual}")


if __name__ == "__main__":
    run_command(main)
