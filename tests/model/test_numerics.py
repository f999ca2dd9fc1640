"""Protects `model.numerics` and the z-loss: what they are at the base shape, how scales follow width and depth, exports, mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import run_values, write_random
from support.models import MODELS, NUMERICS, small
from torch import Tensor

from benchmarks import equality
from lime_dist import build_decoder, load_config
from lime_dist.checkpoint.export import main as export
from lime_dist.checkpoint.importing import main as import_model
from lime_dist.checkpoint.reading import read_weights
from lime_dist.config.load import dump_config, make_config
from lime_dist.errors import LimeError

TOKENS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("name", ["llama", "lime kv, G=3", "lime dynamic", "hyper doubly stochastic", "gated residual"])
def test_nothing_changes_at_the_base_shape(name: str) -> None:
    """The same bits: initial values and logits."""
    base = {"base_hidden_size": 24, "base_num_hidden_layers": 11}
    plain, scaled = (build_decoder(small(**MODELS[name], numerics=numerics)) for numerics in ({}, base))
    for (own, parameter), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(parameter, other), own
    assert torch.equal(plain(TOKENS), scaled(TOKENS))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_initial_values_follow_width_and_depth(tied: bool) -> None:
    """m = 4, d = 3: standard deviations of large matrices, to 2 %."""
    sizes = {
        "architecture": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "vocab_size": 512,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": tied}
    base = {"base_hidden_size": 64, "base_num_hidden_layers": 1}
    decoder = build_decoder(small(**sizes, **heads, numerics=base))
    stds = {name: parameter.std().item() for name, parameter in decoder.named_parameters() if parameter.dim() == 2}
    wanted = {
        "embed_tokens": 0.02,
        "lm_head": 0.02 / 4,
        "o_proj": 0.02 / 2 / math.sqrt(2),
        "down_proj": 0.02 / 2 / math.sqrt(2),
    }
    for name, std in stds.items():
        kind = name.split(".")[-2]
        assert std == pytest.approx(wanted.get(kind, 0.02 / 2), rel=0.02), name
    layer, x = decoder.model.layers[0], torch.randn(2, 7, 256)
    assert layer.self_attn.scale == layer.mlp.scale == pytest.approx(1 / math.sqrt(3))
    out = layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
    torch.testing.assert_close(layer.mlp(x), out / math.sqrt(3))


def change_of_logits(width: int, base: int | None) -> float:
    """Root mean square by which a few steps of the quickstart's learning rate change the logits of a model."""
    values: dict[str, Any] = {
        "model": {
            "architecture": "llama", "vocab_size": 31, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
            "num_attention_heads": width // 16, "tie_word_embeddings": False, "numerics": {"base_hidden_size": base},
        },
        "data": {"sequence_length": 7},
        "train": {"global_batch_size": 8, "micro_batch_size": 8, "steps": 100, "seed": 1},
        "optimizer": {"warmup_steps": 0, "lr": 0.01, "max_grad_norm": 100.0, "weight_decay": 0.0},
    }  # fmt: skip
    config = make_config(values, "a test")
    logits: list[Tensor] = []
    tokens = torch.arange(14).view(2, 7)

    def recorded(model: Any, given: Tensor) -> Tensor:
        with torch.no_grad():
            logits.append(model(tokens))
        out: Tensor = model(given)
        return out

    equality.train_one_process(config, 4, logits=recorded)
    return (logits[-1] - logits[0]).square().mean().sqrt().item()


def test_the_learning_rate_of_a_narrow_model_fits_a_wide_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the width: with µP the logits move about as far as at the base width, without it much farther."""
    monkeypatch.setattr(equality, "perturb", lambda name, parameter: None)  # its noise does not follow the width
    narrow = change_of_logits(32, None)
    assert change_of_logits(256, None) > 4 * narrow
    assert narrow / 2 < change_of_logits(256, 32) < 1.25 * narrow


def test_qk_norm_bounds_the_scores() -> None:
    """Queries and keys of any size have scores of at most √d, with weights of 1."""
    decoder = build_decoder(small(architecture="llama", numerics={"qk_norm": True}))
    attention = decoder.model.layers[0].self_attn
    positions = attention.positions(torch.zeros(1, 7, 24), None)
    with torch.no_grad():
        attention.q_proj.weight *= 1000
    query = attention.queries(torch.randn(1, 7, 24), positions)
    key = attention.keys(1000 * torch.randn(1, 3, 7, 4), positions)
    assert query.norm(dim=-1).max() <= 2 + 1e-3 and key.norm(dim=-1).max() <= 2 + 1e-3  # √d = 2 each
    bounded = build_decoder(small(architecture="llama", numerics={"logit_softcap": 0.01}))
    assert bounded(TOKENS).abs().max() <= 0.01


@pytest.mark.parametrize("architecture", ["llama", "lime"])
def test_an_export_carries_them_and_can_be_imported(dataset: Path, tmp_path: Path, architecture: str) -> None:
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    model = {"architecture": architecture, "numerics": NUMERICS}
    exported = tmp_path / f"exported-{architecture}"  # transformers tells code apart by the folder's name
    write_random(run_values(dataset, tmp_path / "run", **model))
    export(["--checkpoint", str(tmp_path / "run"), "--output", str(exported)])
    described = json.loads((exported / "config.json").read_text())
    assert described["numerics"] == NUMERICS and described["model_type"] == "lime"

    def started(**numerics: Any) -> None:
        values = run_values(dataset, tmp_path / "again", architecture=architecture, numerics=numerics)
        (tmp_path / "again.yaml").write_text(dump_config(make_config(values, "a test")))
        import_model(["--model", str(exported), "--config", str(tmp_path / "again.yaml")])

    with pytest.raises(
        LimeError, match=r"set model.numerics.qk_norm=true model.numerics.logit_softcap=2.0 .*base_num_hidden_layers=4"
    ):
        started()
    started(**NUMERICS)
    wanted, imported = (read_weights(tmp_path / name)[2] for name in ("run", "again"))
    assert all(torch.equal(imported[name], wanted[name]) for name in wanted)


def test_a_llama_has_none_of_them(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    write_random(run_values(dataset, tmp_path / "run", architecture="llama"))
    export(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "exported")])
    assert "numerics" not in json.loads((tmp_path / "exported/config.json").read_text())
    values = run_values(dataset, tmp_path / "again", architecture="llama", numerics={"qk_norm": True})
    (tmp_path / "again.yaml").write_text(dump_config(make_config(values, "a test")))
    with pytest.raises(LimeError, match=r"set model.numerics.qk_norm=false$"):
        import_model(["--model", str(tmp_path / "exported"), "--config", str(tmp_path / "again.yaml")])


def test_mistakes_are_one_line() -> None:
    for setting in ("numerics.residual_scale=0", "numerics.logit_softcap=-1", "numerics.base_hidden_size=0"):
        with pytest.raises(LimeError, match=f"model.{setting.split('=')[0]}"):
            load_config(None, [f"model.{setting}"])
    with pytest.raises(LimeError, match="train.z_loss"):
        load_config(None, ["train.z_loss=-1"])
