"""Protects the analysis of trained models: representations, their measures, routes, and the command that draws them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import exported_in_memory, perturbed, run_values, write_random
from support.models import means_of

from lime_dist.analysis import __main__ as analysis
from lime_dist.analysis.representations import (
    EntropyByLayer,
    Representations,
    dynamic_routers,
    matrix_entropy,
    representations,
)
from lime_dist.analysis.routes import DynamicWeights, frequent_types, routes_of
from lime_dist.analysis.words import MIN_OCCURRENCES, WordStates, count_words, find_words
from lime_dist.checkpoint import export
from lime_dist.config.load import make_config
from lime_dist.data.files import json_bytes
from lime_dist.errors import LimeError
from lime_dist.export.exported import ExportedModel
from lime_dist.export.model_files import model_description
from lime_dist.model.architecture import architecture_of
from lime_dist.model.architectures.lime.depth.history import DepthKeyValueHistory
from lime_dist.model.blocks import Attention
from lime_dist.model.decoder import Decoder
from lime_dist.model.documents import document_starts
from lime_dist.monitor.routers import router_map

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("sklearn", reason="the extra `analysis` is not installed")
pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4}
CHUNKED = {"policy": "chunked", "chunk_size": 2, "rank": 1, "first": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "num_key_value_heads": 2},
    "kv": {"num_key_value_heads": 2},
    "kv-chunked": {"num_key_value_heads": 2, "lime": {"history": CHUNKED}},
    "static": {"lime": {"routes": "hidden", "top_p": 0.9}},
    "dynamic": {"lime": {"routes": "hidden", "router": "dynamic"}},
    "dynamic-chunked": {"lime": {"routes": "hidden", "router": "dynamic", "start_layer": 2, "history": CHUNKED}},
    "hyper": {"architecture": "hyper", "hyper": {"rate": 3, "dynamic": True}},
    "gated": {"architecture": "gated_residual", "gated_residual": {"rate": 3}},
    "attention-residuals": {"architecture": "attention_residuals"},
    "moda": {"lime": {"depth_attention": "moda", "mlp_entries": True, "history": CHUNKED}},
    "value-residual": {"architecture": "value_residual", "value_residual": {"learnable": True}},
}


class Letters:
    """A tokenizer whose tokens decode to their ids."""

    def decode(self, ids: list[int]) -> str:
        return f" t{ids[0]}"


def exported_and_decoder(name: str, folder: Path) -> tuple[ExportedModel, Decoder]:
    """An export without most of its files, and the trainer's decoder with the same weights."""
    config = make_config({"model": SIZES | MODELS[name]}, "a test")
    decoder = perturbed(config.model)
    description = model_description(config)
    (folder / "config.json").write_bytes(json_bytes(description))
    if name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**description)).eval()
        model.load_state_dict(decoder.state_dict(), strict=False)
        model.tie_weights()
    else:
        model = exported_in_memory(config.model, decoder)
    return ExportedModel(folder, {}, model, Letters()), decoder


def samples(count: int, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_representations_are_those_of_the_trainers_decoder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values that attention reads (after the mixture over layers), and every layer's input."""
    exported, decoder = exported_and_decoder(name, tmp_path)
    values, states = [], []
    attend, attend_over_depth = Attention.attend, DepthKeyValueHistory.attend

    def kept(self: Attention, q: Any, k: Any, v: Any, positions: Any) -> Any:
        values.append(v[0].transpose(0, 1).flatten(1))
        return attend(self, q, k, v, positions)

    def kept_by_depth_attention(self: DepthKeyValueHistory, layer: int, q: Any, k: Any, v: Any, mask: Any) -> Any:
        values.append(v[0].transpose(0, 1).flatten(1))
        return attend_over_depth(self, layer, q, k, v, mask)

    monkeypatch.setattr(Attention, "attend", kept)
    monkeypatch.setattr(DepthKeyValueHistory, "attend", kept_by_depth_attention)
    for layer in range(5):
        decoder.get_submodule(f"model.layers.{layer}").register_forward_pre_hook(
            lambda module, given: states.append(given[0][0].sum(-2) if given[0].dim() == 4 else given[0][0])
        )
    decoder.get_submodule("model.norm").register_forward_hook(lambda module, given, out: states.append(out[0]))
    given = samples(2)
    eos = int(given[0][9])
    for end in (None, eos):
        for tokens, sample in zip(given, representations(exported, iter(given), end), strict=True):
            values.clear()
            states.clear()
            with torch.no_grad():
                decoder(tokens.unsqueeze(0), None if end is None else document_starts(tokens.unsqueeze(0), end))
            assert torch.equal(sample.tokens, tokens)
            assert len(sample.layers["values"]) == 5 and len(sample.layers["states"]) == 6
            for kind, wanted in (("values", values), ("states", states)):
                for one, other in zip(sample.layers[kind], wanted, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(router._forward_hooks for router in dynamic_routers(exported).values()), "all hooks are removed"


def test_matrix_entropy() -> None:
    """Agrees with the definition and at both ends of its range, with more rows than columns and with fewer."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 7), (7, 40)):
        rows = torch.randn(shape, generator=generator)
        gram = rows.double() @ rows.double().t()
        eigenvalues = np.linalg.eigvalsh((gram / gram.trace()).numpy())
        wanted = -sum(x * math.log(x) for x in eigenvalues if x > 1e-12)
        assert matrix_entropy(rows) == pytest.approx(wanted, abs=1e-9)
        assert matrix_entropy(7 * rows) == pytest.approx(wanted, abs=1e-6)
    assert matrix_entropy(torch.eye(9)) == pytest.approx(math.log(9))
    assert matrix_entropy(torch.arange(1.0, 6).unsqueeze(1) * torch.ones(1, 4)) == pytest.approx(0, abs=1e-9)
    assert matrix_entropy(torch.zeros(3, 3)) == 0


def test_entropy_by_layer() -> None:
    entropy = EntropyByLayer()
    for scale in (1.0, 0.0):  # two orthogonal rows, then two equal ones
        rows = torch.tensor([[1.0, 0.0], [1.0 - scale, scale]])
        entropy.add(Representations(torch.zeros(2), {"values": [rows], "states": [rows, torch.eye(2)]}, {}))
    one = (pytest.approx(math.log(2) / 2), pytest.approx(math.log(2) / 2))
    assert entropy.summary() == {
        "values": [one],
        "states": [one, (pytest.approx(math.log(2)), pytest.approx(0, abs=1e-9))],
    }


@pytest.mark.parametrize("name", ["dynamic", "dynamic-chunked"])
def test_dynamic_routes(name: str, tmp_path: Path) -> None:
    """Mean weights over all tokens and by type equal those of a loop; the listed routes are those that vary most."""
    exported, _ = exported_and_decoder(name, tmp_path)
    given = samples(8, 60)
    dynamic = DynamicWeights(frequent_types(given))
    by_type: dict[tuple[int, int], list[torch.Tensor]] = {}
    for sample in representations(exported, iter(given)):
        dynamic.add(sample)
        for layer, weights in sample.routing.items():
            torch.testing.assert_close(weights.sum(-1), torch.ones(60, 4))
            for token, weight in zip(sample.tokens.tolist(), weights, strict=True):
                by_type.setdefault((layer, token), []).append(weight)
    first = 2 if name == "dynamic-chunked" else 1
    means = dynamic.means()
    assert list(means) == list(range(first, 5))
    for layer, mean in means.items():
        everything = [weight for (at, _), of_type in by_type.items() if at == layer for weight in of_type]
        torch.testing.assert_close(mean, torch.stack(everything).mean(0).double(), rtol=1e-5, atol=1e-7)
    listed = dynamic.routes(exported)
    assert len(listed) == 20 and all(a.spread >= b.spread > 0 for a, b in zip(listed, listed[1:], strict=False))
    spreads = []
    for layer in means:
        enough = [
            torch.stack(of_type).mean(0) for (at, _), of_type in by_type.items() if at == layer and len(of_type) >= 8
        ]
        spreads += torch.stack(enough).double().std(0).flatten().tolist()
    assert [route.spread for route in listed] == pytest.approx(sorted(spreads, reverse=True)[:20], rel=1e-4)
    for route in listed:
        text, weight = route.tokens[0]
        assert [w for _, w in route.tokens] == sorted((w for _, w in route.tokens), reverse=True)
        if route.entry.startswith("input of layer") and name == "dynamic":
            column = int(route.entry.split()[-1])
            head = int(route.reader.removeprefix("head "))
            mean = torch.stack(by_type[route.layer, int(text[2:])]).mean(0)[head, column].item()
            assert weight == pytest.approx(mean, rel=1e-4)
            assert route.mean == pytest.approx(means[route.layer][head, column].item())
    kinds = {route.entry for route in listed}
    assert any("summary" in entry for entry in kinds) == (name == "dynamic-chunked"), kinds


def test_maps(tmp_path: Path) -> None:
    """Every model with weights over depth has a map, of mean weights where they depend on the token, as the trainer takes them; the
    others have none."""
    for name in MODELS:
        exported, decoder = exported_and_decoder(name, tmp_path)
        given = samples(2)
        dynamic = DynamicWeights(frequent_types(given))
        for sample in representations(exported, iter(given)):
            dynamic.add(sample)
        routes = routes_of(exported, dynamic)
        if name in ("llama", "hyper", "gated"):
            assert routes is None
            continue
        assert routes is not None
        if architecture_of(decoder.config).has_mean_map:
            weights = dict(decoder.named_parameters()) | means_of(decoder, torch.stack(given))
            torch.testing.assert_close(routes.map, router_map(decoder.config, weights), rtol=1e-4, atol=1e-5)
        if name == "attention-residuals":
            continue
        assert routes.map.shape == (5, 5)
        assert routes.self_retrieval[0] == 1 and routes.distance[0] == 0 and routes.entropy[0] == 0
        assert (routes.map.triu(1) == 0).all() and 0 < routes.distance[4] < 4
        if name == "moda":
            torch.testing.assert_close(routes.map.sum(1), torch.ones(5))
            model = exported.model
            with torch.no_grad():
                shares = [model(one[None], output_attentions=True).attentions[3][0] for one in given]
            mean = torch.cat(shares, 1).mean(
                (0, 1)
            )  # 24 tokens; then slot 0, the summary of layers 0 and 1, slot 2: a pair each
            summary = model.state_dict()["model.history.chunks.0.weight"][0].abs()
            wanted = torch.zeros(5)
            wanted[:2] = mean[26:28].sum() * summary / summary.sum()
            wanted[0] += mean[24:26].sum()
            wanted[2], wanted[3] = mean[28:].sum(), mean[:24].sum()
            torch.testing.assert_close(routes.map[3], wanted, rtol=1e-5, atol=1e-6)
        if name == "dynamic":
            rows = torch.stack([dynamic.means()[layer].mean(0).sum() for layer in range(1, 5)])
            torch.testing.assert_close(routes.map[1:].sum(1).double(), rows, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(routes.map[4].double(), dynamic.means()[4].mean(0), rtol=1e-5, atol=1e-6)


def test_attention_residuals(tmp_path: Path) -> None:
    """Blocks of 4 sub-layers; layer 0 reads the embedding, and before its MLP its attention. Listed routes exist."""
    exported, _ = exported_and_decoder("attention-residuals", tmp_path)
    given = samples(8, 60)
    dynamic = DynamicWeights(frequent_types(given))
    for sample in representations(exported, iter(given)):
        dynamic.add(sample)
        assert [weights.shape[1:] for weights in sample.routing.values()] == [(1, 2), (2, 2), (2, 3), (2, 3), (3, 4)]
        for weights in sample.routing.values():
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    routes, listed = routes_of(exported, dynamic), dynamic.routes(exported)
    assert routes is not None and routes.map.shape == (5, 6) and (routes.map.triu(2) == 0).all()
    assert routes.self_retrieval[0] == pytest.approx((routes.map[0, 1] / routes.map[0].sum()).item())
    assert routes.distance[0] == pytest.approx(1 - routes.self_retrieval[0]) and 0 < routes.distance[4] < 5
    blocks = [f"attention of layer {first} to MLP of layer {last}" for first, last in ((0, 1), (2, 3), (4, 4))]
    assert len(listed) == 20 and {route.entry for route in listed} <= {"embedding", *blocks}
    assert {route.reader for route in listed} <= {"attention", "MLP", "last read"}
    for route in listed:
        seen = ("embedding", *blocks).index(route.entry) <= (2 * route.layer + (route.reader != "attention") + 3) // 4
        assert seen and route.spread > 0, route


def test_words_are_found_evenly() -> None:
    given = [torch.tensor([1, 2, 1, 3, 1] * 6), torch.tensor([2, 1, 1, 4, 2] * 6)]
    words = {"one": 1, "two": 2, "three": 3, "five": 5}
    assert count_words(given, words) == {"one": 30, "two": 18, "three": 6, "five": 0}
    occurrences = find_words(given, words, 200)
    assert occurrences is not None and occurrences.words == ["one", "two"] and occurrences.each == 18
    labels = iter(occurrences.labels)
    for tokens, positions in zip(given, occurrences.positions, strict=True):
        assert positions.tolist() == sorted(positions.tolist())
        assert [words[next(labels)] for _ in positions] == tokens[positions].tolist()
    assert next(labels, None) is None
    capped = find_words(given, words, 12)
    assert capped is not None and (capped.labels == "one").sum() == (capped.labels == "two").sum() == 12
    assert capped.positions[0].tolist()[:4] == [0, 1, 2, 4], "the first occurrences"
    assert find_words(given, {"one": 1, "three": 3}, 200) is None and MIN_OCCURRENCES > 6


def test_separability_and_clouds() -> None:
    """Accuracy is 1 where words are far apart, and chance where nothing separates them."""
    generator = torch.Generator().manual_seed(1)
    given = [torch.tensor([1, 2] * 20) for _ in range(5)]
    occurrences = find_words(given, {"one": 1, "two": 2}, 200)
    assert occurrences is not None
    states = WordStates(occurrences)
    for tokens in given:
        noise = torch.randn(len(tokens), 3, generator=generator)
        apart = noise + 9 * (tokens == 2).unsqueeze(1)
        states.add(Representations(tokens, {"values": [apart, noise], "states": [noise]}, {}))
    accuracies = states.separability(seed=0)
    assert accuracies["values"][0] == (1.0, 0.0)
    for mean, deviation in (accuracies["values"][1], accuracies["states"][0]):
        assert 0.35 < mean < 0.65 and deviation > 0
    assert states.separability(seed=0) == accuracies
    (cloud,) = states.clouds("values", [0], seed=0)
    assert cloud.shape == (200, 2)
    centres = [cloud[occurrences.labels == word].mean(0) for word in occurrences.words]
    within = max(cloud[occurrences.labels == word].std() for word in occurrences.words)
    assert np.linalg.norm(centres[0] - centres[1]) > 1.5 * within


@pytest.fixture(scope="module")
def exports(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LLaMA, LIMe over keys and values within documents, LIMe Dynamic, with random weights."""
    folder = tmp_path_factory.mktemp("analysis")
    made = []
    for name in ("llama", "kv", "dynamic"):
        values = run_values(dataset, folder / "runs" / name, **MODELS[name] | {"num_key_value_heads": 4})
        values["data"]["document_mask"] = name == "kv"
        write_random(values)
        export.main(["--checkpoint", str(folder / "runs" / name), "--output", str(folder / name)])
        made.append(folder / name)
    return made


def call(exports: list[Path], dataset: Path, output: Path, *more: str) -> None:
    length = [] if "--sequence-length" in more else ["--sequence-length", "64"]
    analysis.main([*map(str, exports), "--data", str(dataset), "--output", str(output), *length, *more])


def test_the_command_draws_all_models_side_by_side(
    exports: list[Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(exports, dataset, tmp_path / "out", "--words", "eta,xi,alphabeta", "--samples", "40", "--occurrences", "15")
    said = capsys.readouterr().out
    assert "words left out (more than one token after a space in this vocabulary): alphabeta" in said
    assert "words: eta, xi, 15 occurrences of each" in said
    pictures = ["clouds.png", "entropy.png", "retrieval.png", "routers.png", "separability.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*pictures, "analysis.json", "index.html"]
    )
    page = (tmp_path / "out/index.html").read_text()
    for name in pictures:
        image = (tmp_path / "out" / name).read_bytes()
        assert image.startswith(b"\x89PNG") and name in said
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "Tokens to which the router responds: dynamic" in page and "responds: kv" not in page
    numbers = json.loads((tmp_path / "out/analysis.json").read_text())
    assert numbers["samples"] == 40 and numbers["sequence_length"] == 64
    assert numbers["words"] == {"words": ["eta", "xi"], "occurrences_of_each": 15}
    assert list(numbers["models"]) == ["llama", "kv", "dynamic"]
    for name, one in numbers["models"].items():
        assert len(one["entropy"]["values"]) == 5 and len(one["entropy"]["states"]) == 6
        assert all(0 <= mean <= 1 for mean, _ in one["separability"]["values"])
        assert (one["routes"] is None) == (name == "llama")
        assert bool(one["dynamic_routes"]) == (name == "dynamic")
    # A second call gives the same numbers.
    before = (tmp_path / "out/analysis.json").read_bytes()
    call(exports, dataset, tmp_path / "out", "--words", "eta,xi,alphabeta", "--samples", "40", "--occurrences", "15")
    assert (tmp_path / "out/analysis.json").read_bytes() == before
    # Without words, their pictures are removed.
    call(exports[:2], dataset, tmp_path / "out", "--words", "eta,alphabeta", "--samples", "2")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "entropy.png",
        "retrieval.png",
        "routers.png",
    ]


def test_a_model_reads_documents_as_in_its_training(
    exports: list[Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []

    def noting(exported: ExportedModel, given: Any, eos: int | None = None) -> Any:
        ends.append(eos)
        return representations(exported, given, eos)

    monkeypatch.setattr(analysis, "representations", noting)
    call(exports[:2], dataset, tmp_path / "out", "--words", "eta,alphabeta", "--samples", "1")
    assert ends == [None, 2]


def test_words_that_are_too_rare_leave_the_rest(
    exports: list[Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(exports[:1], dataset, tmp_path / "out", "--words", "eta,xi", "--samples", "1")
    said = capsys.readouterr().out
    assert "no pictures of words: at least two words must occur 10 times, but the samples contain: eta " in said
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["entropy.png"]


def test_mistakes(exports: list[Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for more, message in (
        (["--samples", "0"], "--samples 0: must be at least 1"),
        (["--sequence-length", "1"], "--sequence-length 1: must be at least 2"),
        (["--occurrences", "9"], "--occurrences 9: must be at least 10"),
        (["--split", "other"], "no split 'other'"),
        (["--seed", "-1"], "--seed -1: must be from 0 to 4294967295"),
        (["--words", "mu"], "--words mu: pass at least two"),
    ):
        with pytest.raises(LimeError, match=message):
            call(exports, dataset, out, *more)
    with pytest.raises(LimeError, match="llama: is listed twice"):
        call([*exports, exports[0]], dataset, out)
    with pytest.raises(LimeError, match="absent: no such folder"):
        call([*exports, tmp_path / "absent"], dataset, out)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(LimeError, match=r"--output .*file cannot be created"):
        call(exports, dataset, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(LimeError, match="was tokenized with another tokenizer"):
        monkeypatch.setattr(
            analysis, "TokenSplit", lambda *_, **__: SimpleNamespace(tokenizer_hash="other", path=dataset)
        )
        call(exports, dataset, out)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(LimeError, match=r"sklearn is not installed: pip install .*\[analysis\]"):
        call(exports, dataset, out)
