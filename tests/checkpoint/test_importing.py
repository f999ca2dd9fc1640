"""Protects the import of a LLaMA: the run starts with its loss, and import and export leave the weights unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.exports import run_values
from support.models import LLAMA3
from support.workers import WorkerGroup

from lime_dist.checkpoint import export, importing
from lime_dist.config.load import load_config
from lime_dist.data.dataset import TokenSplit
from lime_dist.errors import LimeError
from lime_dist.export import importing as import_work
from lime_dist.export.comparison import validation_batches
from lime_dist.export.exported import model_config, open_export
from lime_dist.model.layers import language_model_loss

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
Workers = Callable[[int], WorkerGroup]
SCALED = {"architecture": "llama", "rope_scaling": LLAMA3}
IDENTITY = {"lime": {"routes": "kv", "router_init": "identity", "history": {"policy": "chunked", "chunk_size": 2}}}


def write_llama(folder: Path, **settings: Any) -> Path:
    """A LLaMA with random weights, written by transformers into several files."""
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, initializer_range=0.2,
            **settings,
        )
    )  # fmt: skip
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its original length is shorter than the sequences of the tests."""
    return write_llama(tmp_path_factory.mktemp("scaled"), max_position_embeddings=40, rope_scaling=dict(LLAMA3))


def values(dataset: Path, run: Path, model: dict[str, Any], steps: int) -> dict[str, Any]:
    settings = run_values(dataset, run, **model)
    return {**settings, "train": {**settings["train"], "steps": steps}}


def import_it(original: Path, settings: dict[str, Any], folder: Path, *overrides: str) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    importing.main(["--model", str(original), "--config", str(folder / "config.yaml"), *overrides])


ZERO = {"architecture": "value_residual", "value_residual": {"weight": 0, "learnable": True}}


@pytest.mark.parametrize(
    ("model", "folder"),
    [(SCALED, "scaled"), (IDENTITY, "original"), (ZERO, "original")],
    ids=["llama, scaled rope", "lime", "value residual"],
)
def test_a_run_starts_with_the_loss_of_the_original(
    model: dict[str, Any],
    folder: str,
    workers: Workers,
    dataset: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """On two stages: the loss before the first step equals the original's, and training starts."""
    original: Path = request.getfixturevalue(folder)
    settings = values(dataset, tmp_path / "run", model, 0)
    import_it(original, settings, tmp_path)
    settings["parallel"] = {"pipeline_stages": 2}
    assert set(workers(2).run("support.runs.run", values=settings)) == {""}
    (record,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(original).eval()
    with torch.no_grad():
        losses = [
            language_model_loss(theirs(tokens).logits, labels).item()
            for tokens, labels in validation_batches(TokenSplit(dataset, "validation"), 16, 8)
        ]
    assert record["step"] == 0 and record["validation_loss"] == pytest.approx(sum(losses) / 8, rel=1e-6)
    settings["train"]["steps"] = 2
    assert set(workers(2).run("support.runs.run", values=settings)) == {""}
    first = next(r for r in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if "loss" in r)
    assert first["step"] == 1 and first["grad_norm"] > 0


def test_import_and_export_keep_the_weights(scaled: Path, dataset: Path, tmp_path: Path) -> None:
    """And the scaling of the rotary embedding."""
    original, settings = scaled, values(dataset, tmp_path / "run", SCALED, 0)
    import_it(original, settings, tmp_path)
    export.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    wanted: dict[str, torch.Tensor] = {}
    for file in original.glob("*.safetensors"):
        wanted.update(load_file(file))
    exported = load_file(tmp_path / "out/model.safetensors")
    assert set(exported) == set(wanted) and all(torch.equal(exported[name], wanted[name]) for name in wanted)
    before, after = (transformers.AutoConfig.from_pretrained(path) for path in (original, tmp_path / "out"))
    assert before.rope_parameters == after.rope_parameters and before.max_position_embeddings == 40
    assert (
        model_config(open_export(tmp_path / "out")).rope_scaling
        == load_config(tmp_path / "config.yaml").model.rope_scaling
    )


def test_mistakes_are_one_line(original: Path, dataset: Path, tmp_path: Path) -> None:
    def line(model: dict[str, Any], *overrides: str, folder: Path = original) -> str:
        with pytest.raises(LimeError) as caught:
            import_it(folder, values(dataset, tmp_path / "run", model, 0), tmp_path, *overrides)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
        return str(caught.value)

    def changed(**entries: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))
        return folder

    llama = {"architecture": "llama"}
    assert "cannot start from a LLaMA" in line({"architecture": "hyper"})
    assert "set model.value_residual.weight=0" in line({"architecture": "value_residual"})
    assert "set model.lime.depth_attention=none" in line({"lime": {"depth_attention": "moda"}})
    assert "set model.lime.routes=kv and model.lime.router_init=identity" in line({})
    assert "set model.intermediate_size=24 model.tie_word_embeddings=true" in line(
        llama, "model.intermediate_size=32", "model.tie_word_embeddings=false"
    )
    assert "config.json: no such file" in line(llama, folder=tmp_path)
    assert "has model_type 'mistral'; only 'llama' and exports of lime_dist.checkpoint.export can be imported" in line(
        llama, folder=changed(model_type="mistral")
    )
    assert "attention_bias=True is not supported, only attention_bias=False" in line(
        llama, folder=changed(attention_bias=True)
    )
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
    supported = "rope_type=yarn is not supported, only default, linear, llama3"
    assert supported in line(llama, folder=changed(rope_parameters=scaling))
    old = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    assert supported in line(llama, folder=changed(rope_parameters=None, rope_theta=10000.0, rope_scaling=old))
    assert "partial_rotary_factor=0.5 is not supported" in line(
        llama,
        folder=changed(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    )
    linear = {"type": "linear", "factor": 2}
    assert "set model.rope_scaling.rope_type=linear model.rope_scaling.factor=2.0" in line(
        llama, folder=changed(rope_parameters=None, rope_theta=10000.0, rope_scaling=linear)
    )
    assert "set model.rope_scaling.rope_type=default model.rope_scaling.factor=null" in line(SCALED)
    assert "rope_scaling.factor=0.5 is not supported" in line(
        llama, folder=changed(rope_parameters={**linear, "factor": 0.5, "rope_theta": 10000.0})
    )
    assert "transformers cannot read it" in line(llama, folder=changed(hidden_size="many"))
    folder = changed()
    next(folder.glob("model-00002*")).unlink()
    assert "model-00002" in line(llama, folder=folder)
    folder = changed()
    next(folder.glob("model-00002*")).write_bytes(b"none")
    assert "is damaged" in line(llama, folder=folder)
    folder = changed()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    gone = index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "of shape" in line(llama, folder=folder)
    assert "no such folder" in line(llama, "data.path=nowhere")


def test_checkpoints_are_never_overwritten(original: Path, dataset: Path, tmp_path: Path) -> None:
    settings = values(dataset, tmp_path / "run", {"architecture": "llama"}, 0)
    import_it(original, settings, tmp_path)
    before = (tmp_path / "run/checkpoints/global_step0/manifest.json").read_bytes()
    with pytest.raises(LimeError, match="holds checkpoints already; give another run.directory"):
        import_it(original, settings, tmp_path)
    assert (tmp_path / "run/checkpoints/global_step0/manifest.json").read_bytes() == before


def test_a_model_that_computes_more_than_its_configuration_says_is_refused(
    original: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = import_work.load_model

    def other(folder: Path) -> Any:
        model = load(folder)
        with torch.no_grad():
            model.model.norm.weight *= 1.001
        return model

    monkeypatch.setattr(import_work, "load_model", other)
    with pytest.raises(LimeError, match="its logits differ from those of the imported model by"):
        import_it(original, values(dataset, tmp_path / "run", {"architecture": "llama"}, 0), tmp_path)
    assert not (tmp_path / "run").exists()
