"""Tests of the compression of routers: exact where possible, else the best fit, and training continues from the result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.exports import perturbed, run_values, write_random
from support.workers import WorkerGroup

from lime_dist.checkpoint.compress import chunked_config, compress_weights, main
from lime_dist.checkpoint.reading import load_decoder, read_weights
from lime_dist.config.load import make_config
from lime_dist.errors import LimeError
from lime_dist.model.decoder import build_decoder

TOKENS = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def full() -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A random model of eleven layers with two K/V heads: its configuration, weights and logits."""
    config = make_config(run_values(Path("data"), Path("run"), num_hidden_layers=11), "a test")
    decoder = perturbed(config.model, torch.float64)
    with torch.no_grad():
        return config, {n: p.detach() for n, p in decoder.named_parameters()}, decoder(TOKENS)


def compressed(
    full: tuple[Any, dict[str, torch.Tensor], torch.Tensor], rank: int, first: int
) -> tuple[float, list[float]]:
    """Largest change of a logit, and the share of the squared weights that each chunk loses."""
    config, weights, wanted = full
    chunked = chunked_config(config, 4, rank, first, Path("run"))
    compressed_weights, fits = compress_weights(chunked, weights)
    decoder = build_decoder(chunked.model, dtype=torch.float64)
    decoder.load_state_dict(compressed_weights)
    with torch.no_grad():
        change = (decoder(TOKENS) - wanted).abs().max().item()
    return change, [fit.left / fit.size for fit in fits]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_row_for_every_layer_changes_nothing(
    full: tuple[Any, dict[str, torch.Tensor], torch.Tensor], first: int
) -> None:
    change, lost = compressed(full, 4, first)
    assert change < 1e-5 * full[2].abs().max() and max(lost) < 1e-20


@pytest.mark.parametrize("first", [0, 2])
def test_the_error_grows_as_the_rank_falls(full: tuple[Any, dict[str, torch.Tensor], torch.Tensor], first: int) -> None:
    lost = [compressed(full, rank, first)[1] for rank in (4, 3, 2, 1)]
    for smaller, larger in zip(lost[1:], lost[:-1], strict=True):
        assert all(a >= b - 1e-20 for a, b in zip(smaller, larger, strict=True))
    assert lost[-1][0] > 0.05 and lost[-1][1] > 0.05, "something is lost at rank 1"


def test_no_other_product_fits_better(full: tuple[Any, dict[str, torch.Tensor], torch.Tensor]) -> None:
    """Any step away from the fitted Q and A increases the residual: the fit is at least a local optimum."""
    config, weights, _ = full
    compressed_weights, fits = compress_weights(chunked_config(config, 4, 1, 0, Path("run")), weights)
    block = torch.cat([weights[f"model.layers.{i}.self_attn.router.weight"][:, :8] for i in range(4, 11)])
    left = torch.cat(
        [compressed_weights[f"model.layers.{i}.self_attn.router.summary_weight"][:, :2] for i in range(4, 11)]
    ).double()
    right = compressed_weights["model.history.chunks.0.weight"].double()
    best = (block - left @ right).pow(2).sum().item()
    assert best == pytest.approx(fits[0].left, rel=1e-5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved_left = left + 0.01 * torch.randn(left.shape, generator=generator, dtype=torch.float64)
        moved_right = right + 0.01 * torch.randn(right.shape, generator=generator, dtype=torch.float64)
        assert (block - moved_left @ moved_right).pow(2).sum().item() > best


def test_training_continues_from_the_result(
    workers: Callable[[int], WorkerGroup], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trained model is compressed exactly; two stages continue with the loss that was printed."""
    values = run_values(dataset, tmp_path / "full")
    assert workers(1).run("support.runs.run", values=values) == [""]
    (trained,) = (r for r in map(json.loads, (tmp_path / "full/metrics.jsonl").open()) if "validation_loss" in r)
    main(
        ["--checkpoint", str(tmp_path / "full"), "--output", str(tmp_path / "new"), "--policy", "chunked"]
        + ["--chunk-size", "2", "--rank", "2"]
    )
    printed = re.search(r"loss ([\d.]+) before, ([\d.]+) after \(8 validation samples", capsys.readouterr().out)
    assert printed is not None
    for loss in printed.groups():
        assert float(loss) == pytest.approx(trained["validation_loss"], abs=1e-4)
    settings = yaml.safe_load((tmp_path / "new/config.yaml").read_text())
    settings["parallel"] = {"pipeline_stages": 2}
    settings["train"]["steps"] = 0
    assert set(workers(2).run("support.runs.run", values=settings)) == {""}
    settings["train"]["steps"] = 2
    assert set(workers(2).run("support.runs.run", values=settings)) == {""}
    records = [json.loads(line) for line in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    assert records[0]["validation_loss"] == pytest.approx(trained["validation_loss"], rel=1e-5)
    steps = [record for record in records if "loss" in record]
    assert [(r["step"], r["consumed_samples"]) for r in steps] == [(1, 16), (2, 20)], (
        "the data continue after 12 samples"
    )


def test_mistakes_are_one_line(dataset: Path, tmp_path: Path) -> None:
    write_random(run_values(dataset, tmp_path / "full"))
    write_random(run_values(dataset, tmp_path / "llama", architecture="llama"))
    write_random(run_values(tmp_path / "gone", tmp_path / "gone run"))

    def line(*options: str, checkpoint: str = "full", chunk_size: str = "2", rank: str = "1") -> str:
        command = ["--checkpoint", str(tmp_path / checkpoint), "--output", str(tmp_path / "new"), "--policy", "chunked"]
        with pytest.raises(LimeError) as caught:
            main([*command, "--chunk-size", chunk_size, "--rank", rank, *options])
        assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
        return str(caught.value)

    assert "only lime, kv, none, full can be compressed" in line(checkpoint="llama")
    assert "model.lime.history.rank=3 is more than the 2 layers of a chunk" in line(rank="3")
    assert "model.lime.history.rank=0" in line(rank="0").replace("'", "")
    assert "--chunk-size 5: no layer comes after a whole chunk" in line(chunk_size="5")
    assert "--samples 0: must be at least 1" in line("--samples", "0")
    assert "no such folder" in line(checkpoint="gone run")
    _, _, weights = read_weights(tmp_path / "full")
    load_decoder(make_config(run_values(dataset, tmp_path), "a test").model, weights)
