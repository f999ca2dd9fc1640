"""Protects the export: the same files from any layout, checked logits and ids, and a refusal in one line that leaves no files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import run_values, write_random
from support.models import LLAMA3
from support.old_tokenizers import copy_as_old
from support.workers import WorkerGroup

from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.__main__ import main as train_tokenizer
from data_tools.tokenizer.round_trip import HARD_TEXTS
from lime_dist.checkpoint.export import main
from lime_dist.checkpoint.manifest import manifest_checksum
from lime_dist.checkpoint.reading import read_weights
from lime_dist.data.indexed import IndexedWriter
from lime_dist.errors import LimeError
from lime_dist.export import exporting
from lime_dist.export.tokenizer_files import check_ids, write_tokenizer

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
Workers = Callable[[int], WorkerGroup]
CHUNKED = {"lime": {"history": {"policy": "chunked", "chunk_size": 2, "rank": 1, "first": 1}}}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "rope_theta": 500.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "lime": {**CHUNKED, "rope_scaling": LLAMA3},
    "hyper": {"architecture": "hyper", "hyper": {"rate": 2}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "gated residual": {"architecture": "gated_residual", "gated_residual": {"rate": 2}},
    "permutations": {"architecture": "hyper", "hyper": {"connection": "permutations", "rate": 2}},
    "moda": {"lime": {"depth_attention": "moda"}},
    "value residual": {"architecture": "value_residual", "value_residual": {"learnable": True}},
    "attention residuals": {"architecture": "attention_residuals", "attention_residuals": {"block_size": 3}},
}


def export(checkpoint: Path, output: Path, *options: str) -> dict[str, Any]:
    main(["--checkpoint", str(checkpoint), "--output", str(output), *options])
    return json.loads((output / "certificate.json").read_text())


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder with a checkpoint of random weights, by kind of model."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, model in KINDS.items():
        write_random(run_values(dataset, folder / kind, **model))
    return {kind: folder / kind for kind in KINDS}


@pytest.mark.slow
def test_a_training_state_saved_by_any_stages_gives_identical_files(
    workers: Workers, dataset: Path, tmp_path: Path
) -> None:
    """The model is trained on one stage. Then 1 and 3 stages, and 2 stages of 2 parts, run a step that changes no weight, and save."""
    values = run_values(dataset, tmp_path / "trained", **CHUNKED)
    assert workers(1).run("support.runs.run", values=values) == [""]
    contents, files = [], []
    for stages, parts in ((1, 1), (3, 1), (2, 2)):
        folder = tmp_path / f"{stages}"
        shutil.copytree(tmp_path / "trained", folder)
        values["run"] = {"directory": str(folder)}
        values["parallel"] = {"pipeline_stages": stages, "virtual_stages": parts}
        values["pipeline"] = {"schedule": "1f1b" if parts == 1 else "interleaved"}
        values["train"] = {**values["train"], "steps": 4}
        assert set(workers(stages).run("support.exports.train_without_updates", values=values)) == {""}
        saved = folder / "checkpoints/global_step4"
        assert len(list(saved.glob("stage*.pt"))) == stages
        certificate = export(folder, folder / "out")
        assert certificate["source"]["checkpoint"] == str(saved) and certificate["source"]["step"] == 4
        files.append(certificate["files"])
        contents.append({p.name: p.read_bytes() for p in (folder / "out").iterdir() if p.name != "certificate.json"})
    assert contents[0] == contents[1] == contents[2] and files[0] == files[1] == files[2]
    assert set(files[0]) == set(contents[0]), "the certificate lists every file"


LOAD_ELSEWHERE = """
import json, sys
for name in ("lime_dist", "data_tools", "deepspeed"):
    sys.modules[name] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
results = {}
for folder in sys.argv[1:]:
    trust = json.load(open(folder + "/config.json"))["model_type"] != "llama"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    ids = tokenizer("alpha beta\\n  gamma", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    more = model.generate(ids, max_new_tokens=8, do_sample=False)
    results[folder] = (type(model).__name__, ids.tolist(), logits.tolist(), more.tolist())
assert not any(name.startswith("lime_dist") for name, module in sys.modules.items() if module)
print(json.dumps(results))
"""


def test_exports_work_where_lime_dist_is_not_installed(runs: dict[str, Path], tmp_path: Path) -> None:
    """With one weights file and several, with and without modelling code; the logits equal those of the trainer's decoder."""
    for kind, run in runs.items():
        certificate = export(run, tmp_path / kind, "--max-shard-size", "20KB" if kind == "lime" else "5GB")
        logits = certificate["logits"]
        assert logits["text"].startswith("validation split of") and logits["tokens"] > 1000
        assert logits["precision"] == "float32" and logits["largest_difference"] <= 1e-5 * logits["largest_logit"]
        assert logits["largest_difference_with_cache"] <= 1e-5 * logits["largest_logit"]
    assert len(list((tmp_path / "lime").glob("model-*.safetensors"))) > 1
    assert not list((tmp_path / "llama").glob("*.py"))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", LOAD_ELSEWHERE, *(str(tmp_path / kind) for kind in KINDS)]
    finished = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout.splitlines()[-1])
    for kind in KINDS:
        name, ids, logits, more = results[str(tmp_path / kind)]
        assert (
            name == ("LlamaForCausalLM" if kind == "llama" else "LimeForCausalLM") and len(more[0]) == len(ids[0]) + 8
        )
        config, _, weights = read_weights(runs[kind])
        decoder = exporting.load_decoder(config.model, weights)
        with torch.no_grad():
            wanted = decoder(torch.tensor(ids))
        torch.testing.assert_close(torch.tensor(logits), wanted, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Made-up words, and what tokenizers treat differently: digits, tabs, runs, rare characters."""
    generator = np.random.default_rng(1)
    letters = list("abcdefghijklmnoprstuvw")
    words = ["".join(generator.choice(letters, size)) for size in generator.integers(1, 9, size=300)]
    return [
        f"Text {i}, {i * 7919} times:\n\treturn  x{i % 3}; {'-' * (i % 40)} é漢\n"
        + " ".join(generator.choice(words, 60))
        for i in range(300)
    ]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def ours(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["train", "--input", str(folder / "texts.jsonl"), "--output", str(folder / "tokenizer")]
    train_tokenizer([*command, "--vocab-size", "600", "--model-type", request.param])
    return Tokenizer(folder / "tokenizer")


@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
def test_exported_tokenizers_give_exactly_the_same_ids(
    ours: Tokenizer, bos: bool, texts: list[str], tmp_path: Path
) -> None:
    """On texts that are hard for tokenizers, on runs of a few characters, and on the training corpus."""
    is_code = ours.facts["model_type"] == "unigram"
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(ours, bos, 128, out)
    theirs = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=is_code)
    generator = np.random.default_rng(0)
    kinds = ["ab", "a ", " \n", "=-", "01 ", "-", " ", "\u2581 x", "é漢 ", "</s>", "<0xE4>", "retun x;"]
    runs = ["".join(generator.choice(list(kinds[i % len(kinds)]), 1 + i % 60)) for i in range(600)]
    record = check_ids(ours, theirs, [*HARD_TEXTS, *runs, *texts])
    assert record["compared_tokens"] > 10000 and record["exact_for_space_marks"]
    assert is_code == bool(list(out.glob("*.py")))
    start = [ours.bos_id] if bos else []
    assert theirs("a\nb").input_ids == [*start, *ours.encode("a\nb").tolist()]
    assert theirs.bos_token_id == (ours.bos_id if bos else ours.eos_id)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    ids = [*ours.encode("a b").tolist(), ours.eos_id]
    assert theirs.decode(ids, skip_special_tokens=True) == "a b" and theirs.decode(ids) == "a b</s>"
    batch = theirs(["a", "a b a b a b"], padding=True)
    assert batch["attention_mask"][0][0] == 0, "batches are padded on the left"
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=is_code)
    assert again("a\n  b").input_ids == theirs("a\n  b").input_ids


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_symbols_are_one_token_in_an_export_too(kind: str, texts: list[str], tmp_path: Path) -> None:
    """Even if other pieces could spell the symbol, and if two symbols are adjacent."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    symbols = ("<answer>", "thein", "=>")
    command = ["train", "--input", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "tokenizer")]
    chosen = [f"--symbol={symbol}" for symbol in symbols]
    train_tokenizer([*command, "--vocab-size", "600", "--model-type", kind, *chosen])
    ours, out = Tokenizer(tmp_path / "tokenizer"), tmp_path / "out"
    out.mkdir()
    write_tokenizer(ours, False, 128, out)
    theirs = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=kind == "unigram")
    generator = np.random.default_rng(0)
    parts = [*symbols, "the", "in", " ", "\n", "<", "answer", ">", "=", "7", "é", "\u2581"]
    mixed = ["".join(generator.choice(parts, 1 + i % 12)) for i in range(600)]
    assert check_ids(ours, theirs, [*HARD_TEXTS, *mixed, *texts])["exact_for_space_marks"]
    for symbol, token_id in ours.facts["symbols"].items():
        assert theirs(f"{symbol}{symbol}").input_ids == [token_id, token_id]
        assert theirs.decode([token_id], skip_special_tokens=True) == symbol


def test_a_tokenizer_folder_of_an_earlier_version(runs: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    """Its file of facts has the same name, tokenizer.json, as a file of the export."""
    old = copy_as_old(dataset / "tokenizer", tmp_path / "old")
    expected = export(runs["llama"], tmp_path / "new")
    assert export(runs["llama"], tmp_path / "of-old", "--tokenizer", str(old))["tokenizer"] == expected["tokenizer"]
    assert (tmp_path / "of-old/tokenizer.json").read_bytes() == (tmp_path / "new/tokenizer.json").read_bytes()


def test_ids_that_differ_are_refused(tmp_path: Path, dataset: Path) -> None:
    ours = Tokenizer(dataset / "tokenizer")
    write_tokenizer(ours, False, 128, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma"
    with pytest.raises(LimeError, match="encodes 'alpha beta .* differently from"):
        check_ids(ours, theirs, [text])


@pytest.mark.parametrize("kind", ["llama", "lime"])
def test_a_mismatch_is_refused_and_nothing_is_left(
    kind: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight is off by a hundredth."""
    write = exporting.write_weights

    def wrong(folder: Path, weights: dict[str, torch.Tensor], size: str) -> None:
        name = "model.layers.3.self_attn.v_proj.weight"
        write(folder, {**weights, name: weights[name] * 1.01}, size)

    monkeypatch.setattr(exporting, "write_weights", wrong)
    with pytest.raises(LimeError, match="is not the trainer's: logits differ by up to"):
        export(runs[kind], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_ways_to_name_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    """A run folder, its checkpoints folder, or one checkpoint. The newest is read, unless `latest` names another."""
    write_random(run_values(dataset, tmp_path))
    folder = tmp_path / "checkpoints"
    newest = folder / "global_step10"
    shutil.copytree(folder / "global_step0", newest)
    (newest / "manifest.json").write_text("{}")
    for given in (tmp_path, folder, folder / "global_step0"):
        assert read_weights(given)[1].step == 0
    (folder / "latest").unlink()
    with pytest.raises(LimeError, match="global_step10: manifest.json is damaged"):
        read_weights(tmp_path)


def damage(folder: Path, what: str) -> None:
    file, manifest = folder / "stage000-replica000.pt", folder / "manifest.json"
    values = json.loads(manifest.read_text())
    if what == "a missing file":
        file.unlink()
    elif what == "a flipped bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif what == "no manifest":
        manifest.unlink()
    elif what == "settings of another version":
        values["config"]["model"]["hidden_sizes"] = 3
        manifest.write_text(json.dumps(values | {"checksum": manifest_checksum(values)}))
    elif what == "another shape":
        values["config"]["model"]["intermediate_size"] = 32
        manifest.write_text(json.dumps(values | {"checksum": manifest_checksum(values)}))
    elif what == "a value changed by hand":
        values["config"]["model"]["intermediate_size"] = 32
        manifest.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a missing file", "stage000-replica000.pt is missing, though manifest.json lists it"),
        ("a flipped bit", "stage000-replica000.pt is damaged: its size or SHA-256 differs"),
        ("no manifest", r"manifest.json cannot be read \(No such file or directory\); give another checkpoint"),
        ("a value changed by hand", "global_step0: manifest.json is damaged; give another checkpoint"),
        ("settings of another version", "was written with settings that this version does not know"),
        ("another shape", r"has no model.layers.0.mlp.gate_proj.weight of shape \[32, 16\]"),
    ],
)
def test_a_damaged_checkpoint_is_refused(what: str, line: str, dataset: Path, tmp_path: Path) -> None:
    write_random(run_values(dataset, tmp_path / "run"))
    damage(tmp_path / "run/checkpoints/global_step0", what)
    with pytest.raises(LimeError, match=line):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(runs: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    def line(*options: str, checkpoint: Path = runs["llama"], output: Path = tmp_path / "out") -> str:
        with pytest.raises(LimeError) as caught:
            export(checkpoint, output, *options)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        return str(caught.value)

    assert "no checkpoint there; give a run folder" in line(checkpoint=tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    assert "already exists; give another --output" in line(output=tmp_path / "full")
    assert "Not a directory; nothing was exported" in line(output=tmp_path / "full/file/below")
    assert "--max-shard-size many: is not a size" in line("--max-shard-size", "many")
    assert "tokenizer_facts.json: no such file" in line("--tokenizer", str(dataset))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"some words {i} and more of them"}) + "\n" for i in range(200)))
    other = tmp_path / "tokenizer"
    train_tokenizer(["train", "--input", str(corpus), "--output", str(other), "--vocab-size", "300"])
    assert "is not the tokenizer that" in line("--tokenizer", str(other))
    values = run_values(dataset, tmp_path / "small", **{**KINDS["llama"], "vocab_size": 310})
    write_random(values)
    assert "has 320 pieces, but model.vocab_size=310" in line(checkpoint=tmp_path / "small")


def test_without_the_shards_only_the_tokenizer_is_needed(dataset: Path, tmp_path: Path) -> None:
    """The models are then compared on a built-in text."""
    write_random(run_values(tmp_path / "gone", tmp_path / "run", **KINDS["llama"]))
    with pytest.raises(
        LimeError, match="the run's data do not name a tokenizer .*no such folder.* give --tokenizer DIR"
    ):
        export(tmp_path / "run", tmp_path / "out")
    with IndexedWriter(tmp_path / "gone", "<u2"):
        pass
    with pytest.raises(LimeError, match="gone: is a Megatron .bin/.idx pair; .*; give --tokenizer DIR"):
        export(tmp_path / "run", tmp_path / "out")
    certificate = export(tmp_path / "run", tmp_path / "out", "--tokenizer", str(dataset / "tokenizer"))
    assert certificate["logits"]["text"] == "built-in text" and certificate["logits"]["tokens"] == 16


def test_float64_decides_if_float32_is_too_coarse(runs: dict[str, Path], tmp_path: Path) -> None:
    """A deep model may amplify the rounding of float32 beyond the tolerance. It is exported nevertheless."""
    compare, tried = exporting.compare_logits, []

    def coarse(first: Any, second: Any, tokens: torch.Tensor) -> Any:
        comparison = compare(first, second, tokens)
        tried.append(next(first.parameters()).dtype)
        if tried[-1] == torch.float32:
            return type(comparison)(1.0, comparison.logit, comparison.tokens)
        return comparison

    exporting.compare_logits = coarse
    try:
        certificate = export(runs["lime"], tmp_path / "out")
    finally:
        exporting.compare_logits = compare
    assert certificate["logits"]["precision"] == "float64" and torch.float64 in tried
    assert certificate["logits"]["largest_difference"] < 1e-10
