"""Tests of named validation sets and of sample texts: they are right on every layout, and training does not notice them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import numbers, records, values, weights
from support.workers import WorkerGroup
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from data_tools.tokenizer import Tokenizer
from lime_dist import report
from lime_dist.config.load import load_config, make_config
from lime_dist.data.run_data import read_run_data
from lime_dist.errors import LimeError
from lime_dist.export.comparison import mean_loss, validation_batches
from lime_dist.export.run_tokenizer import encode_prompts
from lime_dist.model.decoder import Decoder, build_decoder
from lime_dist.model.documents import document_starts
from lime_dist.monitor.tags import scalars

Workers = Callable[[int], WorkerGroup]
PROMPTS = ["alpha beta", "gamma", "", "rho sigma pi"]


def settings(dataset: Path, directory: Path, **monitor: Any) -> dict[str, Any]:
    """20 steps on two stages; the sets are the data's own validation split, and a file that the run does not know as a dataset."""
    configuration = values(dataset, directory, pipeline_stages=2, zero_stage=1)
    configuration["data"]["validation"] = {"own": str(dataset), "whole-file": str(dataset / "train-00000-00")}
    configuration["monitor"] = {"samples": {"prompts": PROMPTS, "interval": 10, "tokens": 6, **monitor}}
    return configuration


def trained(run: dict[str, Any], step: int) -> Decoder:
    model = make_config(run, "a test").model
    decoder = build_decoder(model)
    held = weights(Path(run["run"]["directory"]), step)
    decoder.load_state_dict({name: held[f"{name}/weight"] for name in decoder.state_dict()})
    return decoder


def continued(decoder: Decoder, tokenizer: Tokenizer, prompt: str, length: int, eos: int | None) -> str:
    """The most likely continuation, by one process. Documents of the dataset begin after an eos.

    Args:
        eos: the token behind which attention does not reach; None: it reaches across documents.
    """
    tokens = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    begin = len(tokens)
    while len(tokens) < begin + length:
        read = torch.tensor([tokens])
        following = int(decoder(read, None if eos is None else document_starts(read, eos))[0, -1].argmax())
        if following == tokenizer.eos_id:
            break
        tokens.append(following)
    return tokenizer.decode(tokens[begin:])


LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "two replicas": (4, {}),
    "stock engine, batches of 2": (2, {"train": {"micro_batch_size": 2}, "pipeline": {"engine": "stock"}}),
    "a stage between, document mask": (3, {"parallel": {"pipeline_stages": 3}, "data": {"document_mask": True}}),
    "parts, document mask": (
        2,
        {
            "parallel": {"virtual_stages": 2}, "pipeline": {"schedule": "interleaved"},
            "data": {"document_mask": True},
        },
    ),
}  # fmt: skip
"""Number of processes, and the settings that differ."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_are_right_and_change_nothing(workers: Workers, dataset: Path, tmp_path: Path, layout: str) -> None:
    observed, plain = settings(dataset, tmp_path / "observed"), values(dataset, tmp_path / "plain", pipeline_stages=2)
    processes, changes = LAYOUTS[layout]
    plain["parallel"] = observed["parallel"]
    for run in (observed, plain):
        for section, change in changes.items():
            run[section] = run.get(section, {}) | change
        results = workers(processes).run("support.runs.observe", values=run)
        assert {error for error, _ in results} == {""}, results
    with_both, without = numbers(tmp_path / "observed"), numbers(tmp_path / "plain")
    losses = [record for record in with_both if "loss" in record]
    assert losses == [record for record in without if "loss" in record] and len(losses) == 20
    ours, theirs = weights(tmp_path / "observed", 20), weights(tmp_path / "plain", 20)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    decoder, tokenizer = trained(observed, 20), Tokenizer(dataset / "tokenizer")
    data = read_run_data(make_config(observed, "a test"), 1)
    last = [record for record in with_both if "validation_loss" in record][-1]
    assert last["validation_loss/own"] == last["validation_loss"] and last["step"] == 20
    other = data.validation_sets[1]

    def logits(tokens: Tensor) -> Tensor:
        return decoder(tokens, None if data.eos is None else document_starts(tokens, data.eos))

    batches = validation_batches(other.split, 16, other.evaluation_samples, other.counted)
    expected = mean_loss(logits, batches, counted_share=other.counted_share)
    assert last["validation_loss/whole-file"] == pytest.approx(expected, rel=1e-5)
    assert scalars(last)["validation/whole-file/loss"] == last["validation_loss/whole-file"]
    texts: Any = [record for record in records(tmp_path / "observed") if "sample_texts" in record]
    assert [record["step"] for record in texts] == [10, 20]
    assert texts[-1]["sample_texts"] == {
        prompt: continued(decoder, tokenizer, prompt, 6, data.eos) for prompt in PROMPTS
    }
    board = EventAccumulator(str(tmp_path / "observed/tensorboard")).Reload()
    (shown,) = board.Tensors("samples/text_summary")[-1].tensor_proto.string_val
    assert all(text in shown.decode() for text in texts[-1]["sample_texts"].values())
    page = report.make_page([report.read_run(tmp_path / "observed")])
    assert "Validation: whole-file" in page and "Sample texts" in page and "rho sigma pi" in page


def test_the_replicas_that_wait_are_watched_token_by_token(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """Else ``pipeline.timeout`` would bound the time of all tokens together on the other replicas, and end them."""
    run = settings(dataset, tmp_path, interval=2)
    run["train"] |= {"steps": 2, "checkpoint_interval": 0}
    watched = workers(4).run("support.runs.watched", values=run)
    tokens = [sum(place == "the sample texts after step 2" for place in places) for places in watched]
    assert len(set(tokens)) == 1 and 1 < tokens[0] <= 6


def test_a_temperature_draws_anew_at_each_step_and_a_repeated_run_draws_the_same(
    workers: Workers, dataset: Path, tmp_path: Path
) -> None:
    """Ids that the tokenizer does not have, in a model with a larger vocabulary, are not drawn."""
    written = []
    for directory in (tmp_path / "a", tmp_path / "b"):
        run = settings(dataset, directory, interval=1, temperature=5.0)
        run["model"]["vocab_size"] = 4096
        run["train"] |= {"steps": 3, "checkpoint_interval": 0}
        run["optimizer"]["lr"] = 1e-12
        assert workers(2).run("support.runs.observe", values=run)[0][0] == ""
        written.append(
            [json.dumps(record["sample_texts"]) for record in records(directory) if "sample_texts" in record]
        )
    assert written[0] == written[1] and len(set(written[0])) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.validation={'a b': data/x}", "data.validation: 'a b' cannot name a curve"),
        ("data.validation.wiki=/nowhere", "/nowhere: no such folder"),
        ("train.micro_batch_size=2000", "data.validation.own: .* needs 2000; give more text"),
    ],
)
def test_what_cannot_be_validated_on_is_one_line(dataset: Path, tmp_path: Path, change: str, message: str) -> None:
    run = settings(dataset, tmp_path)
    if change.startswith("data.validation"):
        run["data"].pop("validation")
    else:
        run["train"] |= {"micro_batch_size": 2000, "global_batch_size": 2000, "evaluation_samples": None}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(run))
    with pytest.raises(LimeError, match=f"^[^\n]*{message}[^\n]*$"):
        read_run_data(load_config(path, [change] if change.startswith("data") else []), 1)


def test_a_set_of_another_tokenizer_is_refused(dataset: Path, tmp_path: Path) -> None:
    description = json.loads((dataset / "dataset.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in dataset.iterdir():
        (other / file.name).symlink_to(file)
    (other / "dataset.json").unlink()
    (other / "dataset.json").write_text(json.dumps({**description, "tokenizer_hash": "0" * 64}))
    run = settings(dataset, tmp_path)
    run["data"]["validation"] = {"other": str(other)}
    with pytest.raises(LimeError, match=re.escape("data.validation.other: ") + ".*different tokenizers"):
        read_run_data(make_config(run, "a test"), 1)
    run["data"] |= {"path": str(other), "validation": {}}
    config = make_config(run, "a test")
    assert config.monitor.samples is not None
    with pytest.raises(LimeError, match="monitor.samples: .*is not the tokenizer that .*; pretokenize the data again"):
        encode_prompts(config, config.monitor.samples)


def test_data_without_a_validation_split_of_their_own(dataset: Path, tmp_path: Path) -> None:
    """A folder that is all training text can be validated on as a whole, and trained on with other sets only."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in dataset.iterdir():
        (bare / file.name).symlink_to(file)
    description = json.loads((dataset / "dataset.json").read_text())
    description["splits"]["validation"] = {"documents": 0, "tokens": 0, "shards": []}
    (bare / "dataset.json").unlink()
    (bare / "dataset.json").write_text(json.dumps(description))
    run = settings(bare, tmp_path)
    run["data"]["validation"] = {"own": str(dataset)}
    data = read_run_data(make_config(run, "a test"), 1)
    assert (
        data.validation is None and data.evaluation_samples == 0 and data.validation_sets[0].split.split == "validation"
    )
    assert data.validation_sets[0].evaluation_samples == 4 == run["train"]["evaluation_samples"]
    again = read_run_data(data.settled(make_config(run, "a test")), 1)
    samples = [one.evaluation_samples for one in again.validation_sets]
    assert samples == [4], "the configuration in the run folder means the same"
    run = settings(dataset, tmp_path)
    run["data"]["validation"] = {"bare": str(bare)}
    assert read_run_data(make_config(run, "a test"), 1).validation_sets[0].split.split == "train"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 12}, "monitor.samples: a prompt of .* tokens and monitor.samples.tokens=12 are more than data.sequence_length=16"),
        ({"prompts": []}, "at least 1 item"),
    ],
)  # fmt: skip
def test_samples_that_do_not_fit_are_one_line(
    workers: Workers, dataset: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = settings(dataset, tmp_path, **change)
    if change.get("prompts") == []:
        with pytest.raises(LimeError, match=message):
            make_config(run, "a test")
        return
    errors = {error for error, _ in workers(2).run("support.runs.observe", values=run)}
    assert len(errors) == 1 and re.match(message, errors.pop())
    run["data"]["path"] = str(dataset / "train-00000-00")
    errors = {error for error, _ in workers(2).run("support.runs.observe", values=run)}
    assert len(errors) == 1 and re.match("monitor.samples: the run's data do not name a tokenizer", errors.pop())
