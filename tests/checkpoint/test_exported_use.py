"""Protects exports as others use them: offloaded weights, gradient checkpointing, attention weights, bf16, saving again, file modes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.exports import run_values, write_random
from support.models import LLAMA3
from torch import Tensor, nn

from lime_dist.checkpoint import importing
from lime_dist.checkpoint.export import main as export
from lime_dist.errors import LimeError
from lime_dist.export.exported import load_model

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
HISTORY = {"history": {"policy": "chunked", "chunk_size": 2, "rank": 1, "first": 1}}
HIDDEN = {"num_key_value_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "kv": {"lime": HISTORY},
    "hidden": {**HIDDEN, "rope_scaling": LLAMA3, "lime": {"routes": "hidden", **HISTORY}},
    "dynamic": {**HIDDEN, "lime": {"routes": "hidden", "router": "dynamic"}},
    "hyper": {"architecture": "hyper", "hyper": {"rate": 2}},
    "gated residual": {"architecture": "gated_residual", "gated_residual": {"rate": 2}},
    "permutations": {"architecture": "hyper", "hyper": {"connection": "permutations", "rate": 2}},
    "moda": {"lime": {"depth_attention": "moda", "mlp_entries": True}},
    "value residual": {"architecture": "value_residual", "value_residual": {"learnable": True}},
    "attention residuals": {"architecture": "attention_residuals", "attention_residuals": {"block_size": 3}},
}
TOKENS = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of random weights; the run's folder and configuration lie beside it."""
    folder = tmp_path_factory.mktemp("exports")
    write_random(run_values(dataset, folder / "run", **KINDS[request.param]))
    before = os.umask(0o027)
    try:
        export(["--checkpoint", str(folder / "run"), "--output", str(folder / request.param)])
    finally:
        os.umask(before)
    return folder / request.param


def test_file_modes_follow_the_umask(exported: Path) -> None:
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in exported.iterdir()}
    assert set(modes.values()) == {"0o640"}, modes


def test_gradient_checkpointing_changes_no_gradient(exported: Path) -> None:
    """And less is kept for the backward pass."""
    model = load_model(exported).train()
    losses, gradients, kept = [], [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
        kept.append(sum(sizes))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == losses[1] and kept[1] < kept[0]
    rounding = (
        1e-6 if exported.name == "moda" else 0.0
    )  # an entry has many readers, whose gradients autograd sums in any order
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=rounding * float(gradient.abs().max()))
    assert model.eval()(TOKENS, use_cache=True).past_key_values is not None


def test_attention_weights_are_returned_when_asked_for(exported: Path) -> None:
    model = load_model(exported)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0  # padding on the left
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            plain, explained = model(TOKENS, **given), model(TOKENS, output_attentions=True, **given)
            assert plain.attentions is None and len(explained.attentions) == model.config.num_hidden_layers
            assert torch.allclose(plain.logits, explained.logits, atol=1e-5)
            for layer, weights in enumerate(explained.attentions):
                others = 2 * layer if exported.name == "moda" else 0  # columns of earlier layers follow
                assert weights.shape == (2, 4, 12, 12 + others) and torch.allclose(
                    weights.sum(-1), torch.ones(()), atol=1e-5
                )
                assert not weights[..., :12].triu(1).any(), "no token reads later ones"
        assert not explained.attentions[0][0, :, 3:, :3].any(), "no token reads padding"


def offload(model: nn.Module) -> None:
    """As `accelerate` does: the weights of a module exist only while this module is called, elsewhere they are meta tensors."""
    for module in model.modules():
        own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        if not own:
            continue

        def fetch(module: nn.Module, _: Any, own: dict[str, Tensor] = own) -> None:
            for name, value in own.items():
                module._parameters[name] = nn.Parameter(value)

        def drop(module: nn.Module, *_: Any, own: dict[str, Tensor] = own) -> None:
            for name, value in own.items():
                module._parameters[name] = nn.Parameter(value.to("meta"))

        drop(module)
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)


def test_weights_may_exist_only_while_their_module_is_called(exported: Path) -> None:
    """`device_map` needs this if layers lie on disk or on another device. (With `accelerate` itself, see the next test.)"""
    model = load_model(exported)
    layers = {type(layer).__name__ for layer in model.model.layers}
    assert set(model._no_split_modules) == layers, "layers can lie on different devices"
    with torch.no_grad():
        wanted = model(TOKENS).logits
        offload(model)
        assert torch.equal(model(TOKENS).logits, wanted)


def test_the_trainer_of_transformers_trains_with_gradient_checkpointing(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra `test` is not installed")
    model, samples = load_model(exported), [{"input_ids": row, "labels": row} for row in TOKENS]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, gradient_checkpointing=True, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, learning_rate=0.1, warmup_steps=0,
    )  # fmt: skip
    trained = transformers.Trainer(model=model, args=arguments, train_dataset=samples).train()
    assert math.isfinite(trained.training_loss)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_device_map_with_too_little_memory(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra `test` is not installed")
    model = load_model(exported)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    placed = transformers.AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True, dtype=torch.float32, device_map="auto", max_memory={"cpu": int(0.7 * size)},
        offload_folder=str(tmp_path / "offload"),
    ).eval()  # fmt: skip
    assert set(placed.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(placed(TOKENS).logits, model(TOKENS).logits)


def test_a_model_that_was_saved_again_can_be_imported(exported: Path, dataset: Path, tmp_path: Path) -> None:
    """Its certificate is gone, and so may be the weights that it was made for: the logits are still compared."""
    model = load_model(exported)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    again = tmp_path / f"again-{exported.name}"
    model.save_pretrained(again)
    assert not (again / "certificate.json").exists()
    manifest = json.loads((exported.parent / "run/checkpoints/global_step0/manifest.json").read_text())
    settings = manifest["config"]
    settings["run"] = {"directory": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    importing.main(["--model", str(again), "--config", str(tmp_path / "run.yaml")])
    assert (tmp_path / "run/checkpoints/global_step0/manifest.json").exists()
    for other in ("model.rope_theta=7.0", "model.rope_scaling={rope_type: linear, factor: 9}"):
        with pytest.raises(LimeError, match=r"the configuration does not describe the model .*; set model\.rope_"):
            importing.main(["--model", str(again), "--config", str(tmp_path / "run.yaml"), other])


@pytest.fixture
def bfloat16(exported: Path, tmp_path: Path) -> Iterator[Path]:
    export(
        [
            "--checkpoint",
            str(exported.parent / "run"),
            "--output",
            str(tmp_path / f"bf16-{exported.name}"),
            "--dtype",
            "bfloat16",
        ]
    )
    yield tmp_path / f"bf16-{exported.name}"


def test_an_export_in_bfloat16_is_half_as_large_and_the_rounded_model(exported: Path, bfloat16: Path) -> None:
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (exported, bfloat16)]
    assert sizes[1] < 0.8 * sizes[0]
    assert json.loads((bfloat16 / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((bfloat16 / "certificate.json").read_text())["dtype"] == "bfloat16"
    stored = transformers.AutoModelForCausalLM.from_pretrained(bfloat16, trust_remote_code=True, dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    rounded = {name: parameter.bfloat16() for name, parameter in load_model(exported).named_parameters()}
    assert all(torch.equal(parameter, rounded[name]) for name, parameter in stored.named_parameters())
