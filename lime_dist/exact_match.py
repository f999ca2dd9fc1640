"""How many questions of a split an exported model answers as their documents do, token by token, and how many final answers agree."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lime_dist.errors import LimeError, run_command

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lime_dist.export.exported import ExportedModel

EXAMPLE = """example:
  python -m lime_dist.exact_match --model exported/arithmetic --data data/arithmetic/shards --show 3"""

LONGER = 2
"""Times the longest solution of a batch: where a solution that does not end is cut off."""


@dataclass(frozen=True)
class Question:
    """A document in two: ids up to the mark, which the model is given, and ids after it, without eos."""

    prompt: list[int]
    solution: list[int]


@dataclass(frozen=True)
class Wrong:
    """A question that was not answered as its document does."""

    question: str
    expected: str
    found: str


@dataclass(frozen=True)
class Score:
    """Of so many questions: whole solutions that are equal, final answers that are, and the other solutions."""

    questions: int
    exact: int
    final: int
    wrong: list[Wrong]

    def summary(self) -> dict[str, Any]:
        """Shares with their 95 % intervals."""
        found: dict[str, Any] = {"questions": self.questions}
        for name, count in (("exact", self.exact), ("final", self.final)):
            found[name] = {"count": count, "share": count / self.questions, "interval": wilson(count, self.questions)}
        return found


def wilson(count: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    centre, spread = count + z * z / 2, z * math.sqrt(count * (trials - count) / trials + z * z / 4)
    low, high = ((centre + side * spread) / (trials + z * z) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def final_answer(solution: str) -> str:
    """What stands behind the last ``=`` or line break."""
    return re.split("[=\n]", solution)[-1]


def read_questions(data: Path, split: str, mark: int, eos: int, bos: int, samples: int) -> list[Question]:
    """The first documents of a split that hold the mark; ``samples`` 0: all.

    Raises:
        LimeError: there is none.
    """
    found: list[Question] = []
    for document in _documents(data, split):
        ids = document.tolist()
        if mark not in ids:
            continue
        place = ids.index(mark) + 1
        # Documents without bos began after another one's eos.
        begin = [] if ids[0] == bos else [eos]
        solution = ids[place:-1] if ids[-1] == eos else ids[place:]
        found.append(Question([*begin, *ids[:place]], solution))
        if len(found) == samples:
            break
    if not found:
        raise LimeError(f"{data}: no document of split {split!r} holds the token {mark} (data.answer_token of the run)")
    return found


def _documents(data: Path, split: str) -> Iterator[np.ndarray]:
    from lime_dist.data.dataset import read_dataset_json
    from lime_dist.data.indexed import IndexedDataset

    for shard in read_dataset_json(data)["splits"][split]["shards"]:
        documents = IndexedDataset(data / shard["name"])
        for i in range(len(documents)):
            yield documents.document(i)


def answer(model: Any, prompts_BT: torch.Tensor, eos: int, limit: int) -> list[list[int]]:
    """The likeliest token after the other, up to eos, which is left out, or ``limit`` tokens; keys and values are kept."""
    import torch

    rows: list[torch.Tensor] = []
    tokens, cache = prompts_BT, None
    ended = torch.zeros(len(prompts_BT), dtype=torch.bool, device=prompts_BT.device)
    with torch.no_grad():
        while len(rows) < limit and not ended.all():
            found = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = found.logits[:, -1:].argmax(-1), found.past_key_values
            rows.append(tokens)
            ended |= tokens[:, 0] == eos
    solutions = torch.cat(rows, 1).tolist()
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in solutions]


def score(exported: ExportedModel, questions: Sequence[Question], eos: int, batch_size: int) -> Score:
    """Ask the model. Only prompts of one length share a batch: padding could change a near tie."""
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
                for question, found in zip(batch, answer(exported.model, prompts, eos, limit), strict=True):
                    if found == question.solution:
                        exact, final = exact + 1, final + 1
                        continue
                    expected, said = decode(question.solution), decode(found)
                    final += final_answer(expected) == final_answer(said)
                    wrong.append(Wrong(decode(question.prompt, skip_special_tokens=True), expected, said))
                bar.update(len(batch))
    return Score(len(questions), exact, final, wrong)


def exact_match(
    model: Path, data: Path, split_name: str, samples: int, answer_token: int | None, batch_size: int
) -> Score:
    """Score an export on the documents of a split.

    Args:
        samples: the first so many documents with an answer; 0: all.
        answer_token: the mark; None: the one that the run was trained with.

    Raises:
        LimeError: the model or the data cannot be read, do not belong together, or the mark is not known.
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
    mark = certificate["training"].get("answer_token") if answer_token is None else answer_token
    answers = find_answers(split, mark)
    if answers is None:
        raise LimeError(f"{model}: was trained without data.answer_token; give the mark's id as --answer-token")
    bos = read_dataset_json(data).get("bos_id", -1)
    questions = read_questions(data, split_name, answers.mark, answers.eos, bos, samples)
    return score(open_verified(model, certificate), questions, answers.eos, batch_size)


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.exact_match``."""
    parser = argparse.ArgumentParser(
        prog="python -m lime_dist.exact_match",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, help="the --output of lime_dist.checkpoint.export")
    parser.add_argument("--data", required=True, type=Path, help="folder of shards of the same tokenizer")
    parser.add_argument("--split", default="validation", help="default: validation")
    parser.add_argument("--samples", type=int, default=1000, help="the first so many documents (default 1000; 0: all)")
    parser.add_argument("--answer-token", type=int, help="id of the mark before an answer (default: the run's)")
    parser.add_argument("--batch-size", type=int, default=256, help="questions at a time (default 256)")
    parser.add_argument("--show", type=int, default=0, metavar="K", help="print the first K wrong solutions")
    parser.add_argument("--json", action="store_true", help="print the numbers alone, as JSON")
    options = parser.parse_args(arguments)
    given = (options.model, options.data, options.split, options.samples, options.answer_token, options.batch_size)
    found = exact_match(*given)
    if options.json:
        print(json.dumps(found.summary()))
        return
    print(f"{found.questions:,} {options.split} documents of {options.data}")
    for name, label in (("exact", "whole solution"), ("final", "final answer")):
        one = found.summary()[name]
        low, high = one["interval"]
        print(f"{label} equal: {one['count']:,}, {one['share']:.2%} (95 % interval {low:.2%} to {high:.2%})")
    for wrong in found.wrong[: max(0, options.show)]:
        print(f"question: {wrong.question}\nexpected: {wrong.expected}\nfound:    {wrong.found}")


if __name__ == "__main__":
    run_command(main)
