"""Protects runs with `data.document_mask`: resumed, blended and ramped as without it; the losses of exports; the plan; bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import run_values, write_random
from support.folders import numbers, records, values, weights
from support.workers import WorkerGroup

from lime_dist import load_config
from lime_dist.checkpoint.export import main as export
from lime_dist.config.labels import IGNORED_LABEL
from lime_dist.config.load import make_config
from lime_dist.data.answers import WithinDocuments, find_counted
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.documents import MASK, attended_length, attention_length, find_eos
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.loader import ValidationBatches
from lime_dist.data.run_data import read_run_data
from lime_dist.errors import LimeError
from lime_dist.evaluate import evaluate
from lime_dist.model.documents import document_starts
from lime_dist.model.layers import language_model_loss
from lime_dist.plan.stage_times import stage_times

Workers = Callable[[int], WorkerGroup]
EOS = 2


def masked(dataset: Path, directory: Path, **parallel: Any) -> dict[str, Any]:
    """Six steps over samples of two or three documents, of a blend, with a growing batch, a second validation set and sample texts."""
    configuration = values(dataset, directory, steps=6, **parallel)
    blend = [{"path": str(dataset), "weight": weight} for weight in (1.0, 2.0)]
    configuration["data"] = {"blend": blend, "sequence_length": 128, "document_mask": True}
    ramp = {"start": 2, "increment": 2, "samples": 8}
    configuration["train"] |= {"batch_ramp": ramp, "evaluation_interval": 2, "checkpoint_interval": 3}
    configuration["data"]["validation"] = {"again": str(dataset)}
    configuration["monitor"] = {"samples": {"prompts": ["alpha beta"], "interval": 3, "tokens": 4}}
    return configuration


def test_a_run_of_three_stages(workers: Workers, dataset: Path, tmp_path: Path) -> None:
    """A stopped and resumed run ends with the same numbers and weights, and one process has the same losses. The stage in the
    middle reads the tokens too: if they are others there, the run ends."""
    run, case = workers(3).run, "support.runs.observe"
    straight, stopped = (masked(dataset, tmp_path / name, pipeline_stages=3) for name in ("straight", "stopped"))
    (error, said), *_ = run(case, values=straight)
    assert error == "" and "documents do not see each other" in said and "answers only" not in said
    assert run(case, values=stopped, events=[{"do": "signal", "rank": 1, "step": 4}])[0][0] == ""
    assert len(records(tmp_path / "stopped")) < len(records(tmp_path / "straight"))
    assert run(case, values=stopped)[0][0] == ""
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight")
    ours, theirs = (weights(tmp_path / name, 6) for name in ("stopped", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert workers(1).run(case, values=masked(dataset, tmp_path / "one"))[0][0] == ""
    for own, other in zip(records(tmp_path / "one"), records(tmp_path / "straight"), strict=True):
        for key in ("loss", "validation_loss", "validation_loss/again"):
            assert own.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-5)
    other_seed = masked(dataset, tmp_path / "other", pipeline_stages=3)
    (error, _), *_ = run(case, values=other_seed, per_rank={1: {"data": {"seed": 7}}})
    assert (
        error.startswith("step 1: two stages of replica 0 read different tokens for sample") and "stage 1 from" in error
    )


@pytest.mark.parametrize("architecture", ["llama", "lime"])
def test_the_loss_of_an_export_is_the_runs(dataset: Path, tmp_path: Path, architecture: str) -> None:
    """Also of a LLaMA, whose code is that of `transformers`."""
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    configuration = run_values(dataset, tmp_path / "run", architecture=architecture)
    configuration["data"] |= {"sequence_length": 128, "document_mask": True}
    config, decoder = write_random(configuration)
    exported = tmp_path / f"{architecture}-of-documents"  # transformers keeps modules by the name of the folder
    export(["--checkpoint", str(tmp_path / "run"), "--output", str(exported)])
    split = TokenSplit(dataset, "validation")
    counted = find_counted(split, config.data)
    assert counted == WithinDocuments(EOS)
    losses = []
    for tokens, labels in ValidationBatches(split, 128, 8, 4, 0, 1, counted):
        assert torch.equal(labels == IGNORED_LABEL, tokens == EOS) and 0 < (labels == IGNORED_LABEL).sum() < 24
        with torch.no_grad():
            masks = (document_starts(tokens, EOS), None)
            masked_logits, plain = (decoder(tokens, starts) for starts in masks)
        assert (masked_logits - plain).abs().max() > 1e-2
        losses.append(language_model_loss(masked_logits, labels, counted.share(split, 128, 8)).item())
    loss = evaluate(exported, dataset, "validation", None, None)
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_plan_counts_the_keys_that_attention_reads(dataset: Path) -> None:
    """Counted token by token; data that are not here count as one document."""
    split = TokenSplit(dataset, "train")
    rows = np.stack([split.sample(i, 128) for i in range(20)])
    read = [t - max([0, *(np.flatnonzero(row[:t] == EOS) + 1)]) + 1 for row in rows for t in range(128)]
    assert attended_length(split, 128, 20, EOS) == pytest.approx(2 * np.mean(read) - 1)
    base = {
        "model": {"vocab_size": 320, "num_hidden_layers": 4},
        "data": {"path": str(dataset), "sequence_length": 128},
    }
    plain = make_config(base, "a test")
    mask = make_config({**base, "data": {**base["data"], "document_mask": True}}, "a test")
    length = attention_length(mask.data, 320)
    assert length < 128 == attention_length(plain.data, 320)
    less = stage_times(plain, 1.0, [0, 4])[0].forward - stage_times(mask, 1.0, [0, 4])[0].forward
    tokens = 128 * plain.train.micro_batch_size
    assert less == pytest.approx(tokens * 4 * 2 * 2 * plain.model.hidden_size * (128 - length) / 2)
    moda = {**base["model"], "lime": {"depth_attention": "moda"}}
    with_tensor = [make_config({"model": moda, "data": each.data.model_dump()}, "a test") for each in (plain, mask)]
    assert stage_times(with_tensor[0], 1.0) == stage_times(with_tensor[1], 1.0), "a mask that is a tensor saves no work"
    elsewhere = mask.data.model_copy(update={"path": "/nowhere"})
    assert attention_length(elsewhere, 320) == 128


def test_pairs_need_the_eos_and_mistakes_are_one_line(dataset: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "pair", np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.array([7, 5, 9, EOS]))
    configuration = run_values(dataset, tmp_path / "run")
    configuration["train"]["evaluation_samples"] = 0
    configuration["data"] = {"path": str(tmp_path / "pair"), "sequence_length": 8, "document_mask": True}
    with pytest.raises(
        LimeError, match=r"data.document_mask=true needs documents that end with a known eos .* data.eos_token"
    ):
        read_run_data(make_config(configuration, "a test"), 1)
    configuration["data"]["eos_token"] = EOS
    data = read_run_data(make_config(configuration, "a test"), 1)
    assert data.eos == EOS and data.counted_shares.training == pytest.approx(0.75)
    with pytest.raises(LimeError, match=f"data.eos_token=3, but the documents of {dataset} end with 2; leave out"):
        find_eos(TokenSplit(dataset, "train"), 3, MASK)
    blend = [{"path": path, "weight": 1.0} for path in (str(dataset), configuration["data"].pop("path"))]
    refused = [
        ({"blend": blend}, f"needs documents that end with a known eos token, and {tmp_path / 'pair'} names none"),
        ({"blend": blend, "eos_token": 3}, f"data.eos_token=3, but the documents of {dataset} end with 2; leave out"),
        (
            {"path": str(tmp_path / "pair"), "eos_token": 9, "validation": {"again": str(dataset)}},
            f"data.validation.again: the documents of {dataset} end with the token 2, those of {tmp_path / 'pair'} with 9",
        ),
    ]
    configuration["data"].pop("eos_token")
    configuration["train"]["evaluation_samples"] = 4
    for keys, line in refused:
        with pytest.raises(LimeError, match=line):
            read_run_data(make_config({**configuration, "data": {**configuration["data"], **keys}}, "a test"), 1)
    with pytest.raises(LimeError, match="data.eos_token=2 has no meaning without data.document_mask"):
        load_config(None, ["data.eos_token=2"])
