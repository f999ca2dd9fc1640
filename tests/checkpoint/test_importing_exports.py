"""Protects fine-tuning: a run starts with exactly the weights of an export of any architecture, or is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.exports import run_values, write_random
from support.tasks import make_shards, task_values
from support.workers import WorkerGroup

from lime_dist.checkpoint import export, importing
from lime_dist.checkpoint.compress import compress
from lime_dist.checkpoint.reading import load_decoder, read_weights
from lime_dist.config.labels import IGNORED_LABEL
from lime_dist.data.answers import find_answers
from lime_dist.data.blend import open_training
from lime_dist.data.loader import TrainBatches
from lime_dist.errors import LimeError
from lime_dist.evaluate import evaluate
from lime_dist.export import importing as import_work

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "kv": {"lime": {"routes": "kv"}, "tie_word_embeddings": False},
    "chunked": {"lime": {"history": {"policy": "chunked", "chunk_size": 2, "rank": 1, "first": 1}}},
    "hidden": {"lime": {"routes": "hidden", "top_p": 0.8, "start_layer": 2}, "num_key_value_heads": 4},
    "dynamic": {"lime": {"routes": "hidden", "router": "dynamic"}, "num_key_value_heads": 4},
    "hyper": {"architecture": "hyper", "hyper": {"rate": 2}},
    "gated residual": {"architecture": "gated_residual", "gated_residual": {"rate": 2}},
    "doubly stochastic": {"architecture": "hyper", "hyper": {"connection": "doubly_stochastic", "rate": 2}},
    "moda": {"lime": {"depth_attention": "moda", "mlp_entries": True}},
    "value residual": {"architecture": "value_residual", "value_residual": {"learnable": True}},
    "attention residuals": {"architecture": "attention_residuals", "attention_residuals": {"block_size": 3}},
}


@pytest.fixture(scope="module")
def exports(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export with random weights of every kind of model, by kind."""
    folder = tmp_path_factory.mktemp("exports")
    for kind, model in MODELS.items():
        write_random(run_values(dataset, folder / "runs" / kind, **model))
        command = ["--checkpoint", str(folder / "runs" / kind), "--output", str(folder / kind)]
        export.main([*command, "--max-shard-size", "20KB"])
    return {kind: folder / kind for kind in MODELS}


def import_it(exported: Path, values: dict[str, Any], folder: Path, *overrides: str) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    importing.main(["--model", str(exported), "--config", str(folder / "config.yaml"), *overrides])


@pytest.mark.parametrize("kind", MODELS)
def test_the_run_has_the_weights_of_the_export(
    kind: str, exports: dict[str, Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bits, at step 0; the logits are compared."""
    import_it(exports[kind], run_values(dataset, tmp_path / "run", **MODELS[kind]), tmp_path)
    assert "logits differ by at most" in capsys.readouterr().out
    _, _, wanted = read_weights(exports[kind].parent / "runs" / kind)
    _, state, imported = read_weights(tmp_path / "run")
    assert (state.step, state.consumed_samples) == (0, 0) and set(imported) == set(wanted)
    assert all(torch.equal(imported[name], wanted[name]) for name in wanted)


def test_another_initialisation_of_routers_is_the_same_model(
    exports: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    """Trained weights have replaced the initial values of the routers."""
    model = {**MODELS["kv"], "lime": {"routes": "kv", "router_init": "identity"}}
    import_it(exports["kv"], run_values(dataset, tmp_path / "run", **model), tmp_path)
    assert (tmp_path / "run/checkpoints/global_step0").is_dir()


def test_float64_decides_if_float32_is_too_coarse(
    exports: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights written to the checkpoint are still those of the file."""
    compare, tried = import_work.compare_logits, []

    def coarse(first: Any, second: Any, tokens: torch.Tensor) -> Any:
        tried.append((next(first.parameters()).dtype, second(tokens[:1]).dtype))
        comparison = compare(first, second, tokens)
        return type(comparison)(1.0, comparison.logit, comparison.tokens) if len(tried) == 1 else comparison

    monkeypatch.setattr(import_work, "compare_logits", coarse)
    import_it(exports["hidden"], run_values(dataset, tmp_path / "run", **MODELS["hidden"]), tmp_path)
    assert tried == [(torch.float32, torch.float32), (torch.float64, torch.float64)]
    _, _, wanted = read_weights(exports["hidden"].parent / "runs/hidden")
    _, _, imported = read_weights(tmp_path / "run")
    assert all(torch.equal(imported[name], wanted[name]) for name in wanted)


def test_mistakes_are_one_line(exports: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    def line(exported: Path, kind: str, *overrides: str, data: Path = dataset) -> str:
        with pytest.raises(LimeError) as caught:
            import_it(exported, run_values(data, tmp_path / "run", **MODELS[kind]), tmp_path, *overrides)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
        return str(caught.value)

    assert line(exports["hyper"], "llama").endswith("set model.architecture=hyper")
    assert line(exports["kv"], "hyper").split("set ")[1].split() == [
        "model.architecture=lime", "model.tie_word_embeddings=false", "model.lime.history.policy=full", "model.lime.routes=kv",
        "model.lime.router=static", "model.lime.depth_attention=none", "model.lime.mlp_entries=false", "model.lime.top_p=null",
        "model.lime.start_layer=1",
    ]  # fmt: skip
    assert line(exports["hidden"], "dynamic").endswith(
        "set model.lime.router=static model.lime.top_p=0.8 model.lime.start_layer=2"
    )
    assert line(exports["chunked"], "chunked", "model.lime.history.rank=2", "model.hidden_size=32").endswith(
        "set model.hidden_size=16 model.lime.history.rank=1"
    )
    changed = tmp_path / "changed"
    shutil.copytree(exports["kv"], changed)
    values = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))
    assert "changed since the export" in line(changed, "kv")
    (changed / "certificate.json").unlink()
    assert line(changed, "kv").endswith(
        "set model.rms_norm_eps=0.001"
    )  # without a certificate, as after save_pretrained
    (tmp_path / "task").mkdir()
    shards = make_shards(tmp_path / "task", 100)
    assert "was tokenized with another tokenizer" in line(exports["llama"], "llama", data=shards)


def test_fine_tuning_starts_at_the_loss_of_the_export(workers: Callable[[int], WorkerGroup], tmp_path: Path) -> None:
    """A model of text is fine-tuned on a task's answers on two stages. Its export has the trainer's validation loss."""
    shards = make_shards(tmp_path)
    text = task_values(shards, tmp_path / "text")
    text["data"]["answer_token"] = None
    write_random(text)
    export.main(["--checkpoint", str(tmp_path / "text"), "--output", str(tmp_path / "out")])
    task = task_values(shards, tmp_path / "task")
    import_it(tmp_path / "out", task, tmp_path)
    task["parallel"], task["train"]["evaluation_interval"] = {"pipeline_stages": 2}, 1
    assert set(workers(2).run("support.runs.run", values={**task, "train": {**task["train"], "steps": 0}})) == {""}
    wanted_loss = first_training_loss(task, tmp_path / "task")
    first = json.loads((tmp_path / "task/metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
    assert set(workers(2).run("support.runs.run", values=task)) == {""}
    records = [json.loads(line) for line in (tmp_path / "task/metrics.jsonl").read_text().splitlines()]
    last = [record["validation_loss"] for record in records if "validation_loss" in record][-1]
    for directory, name, wanted in (("task/checkpoints/global_step0", "before", first), ("task", "after", last)):
        export.main(["--checkpoint", str(tmp_path / directory), "--output", str(tmp_path / name)])
        assert evaluate(tmp_path / name, shards, "validation", None, None) == pytest.approx(wanted, rel=1e-6)
    assert first != last
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == pytest.approx(wanted_loss, rel=1e-5)
    whole = evaluate(tmp_path / "out", shards, "validation", None, None)
    assert abs(whole - first) > 1e-3, "the loss over all tokens differs"
    again = evaluate(tmp_path / "before", shards, "validation", None, None, all_tokens=True)
    assert again == pytest.approx(whole, rel=1e-6)

    before, _ = compress(tmp_path / "task", tmp_path / "small", 2, 2, 0, None)
    assert before == pytest.approx(last, rel=1e-6)
    task["data"]["answer_token"] = None
    (line, _) = workers(2).run("support.runs.run", values=task)
    assert "is of another run (data.answer_token: 5 there, null here)" in line, "its losses count other tokens"


def first_training_loss(values: dict[str, Any], directory: Path) -> float:
    """The loss of the first step from the run's checkpoint, over answers only, in one process."""
    config, _, weights = read_weights(directory)
    split, order = open_training(config.data, config.model.vocab_size)
    answers = find_answers(split, values["data"]["answer_token"])
    assert answers is not None
    length, size = config.data.sequence_length, config.train.global_batch_size
    batches = TrainBatches(split, order, length, size, size, 0, 1, counted=answers)
    tokens, labels = next(batches)
    batches.close()
    assert 0 < (labels == IGNORED_LABEL).sum() < labels.numel()
    logits = load_decoder(config.model, weights)(tokens)
    total = torch.nn.functional.cross_entropy(
        logits[labels != IGNORED_LABEL], labels[labels != IGNORED_LABEL], reduction="sum"
    )
    return total.item() / (labels.numel() * answers.share(split, length, order.num_samples))
