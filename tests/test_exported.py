"""Protects the use of an exported model: verification, generation, and a loss equal to the trainer's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exports import run_values
from support.workers import WorkerGroup

from data_tools.tokenizer import Tokenizer
from lime_dist import evaluate, generate
from lime_dist.checkpoint import export
from lime_dist.data.indexed import IndexedDataset, IndexedWriter
from lime_dist.errors import LimeError
from lime_dist.export.exported import ExportedModel, open_export, verify

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")


@pytest.fixture(scope="module")
def trained(
    workers: Callable[[int], WorkerGroup], dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """An export, in several files, of a model trained for three steps, and the trainer's validation loss."""
    folder = tmp_path_factory.mktemp("exported")
    values = run_values(dataset, folder / "run", lime={"history": {"policy": "first_last"}})
    assert workers(1).run("support.runs.run", values=values) == [""]
    command = ["--checkpoint", str(folder / "run"), "--output", str(folder / "out"), "--max-shard-size", "20KB"]
    export.main(command)
    (loss,) = (
        r["validation_loss"]
        for r in map(json.loads, (folder / "run/metrics.jsonl").open())
        if "step" in r and "validation_loss" in r
    )
    return folder / "out", loss


def test_the_loss_is_the_trainers(
    trained: tuple[Path, float], dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default, `evaluate` uses the samples that the run validated on."""
    out, loss = trained
    evaluate.main(["--model", str(out), "--data", str(dataset)])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"8 validation samples of 16 tokens of {dataset}"
    assert float(second.split()[1]) == pytest.approx(loss, rel=1e-5)
    assert evaluate.evaluate(out, dataset, "validation", 8, 16) == pytest.approx(loss, rel=1e-6)


def test_device_and_batch_size(trained: tuple[Path, float], dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss does not depend on them, and logits stay on the device of the model."""
    out, loss = trained
    sizes, devices = [], set()
    original = ExportedModel.logits

    def watched(exported: ExportedModel, tokens: torch.Tensor, eos: int | None = None) -> torch.Tensor:
        logits = original(exported, tokens, eos)
        sizes.append(len(tokens))
        devices.add((logits.device.type, exported.model.device.type))
        return logits

    monkeypatch.setattr(ExportedModel, "logits", watched)
    evaluate.main(["--model", str(out), "--data", str(dataset), "--device", "cpu", "--batch-size", "3"])
    assert sizes == [3, 3, 2] and devices == {("cpu", "cpu")}
    assert evaluate.evaluate(out, dataset, "validation", 8, 16, batch_size=3) == pytest.approx(loss, rel=1e-6)
    with pytest.raises(LimeError, match="--batch-size 0: must be at least 1"):
        evaluate.main(["--model", str(out), "--data", str(dataset), "--batch-size", "0"])
    for device in ("cuda:99", "gpu"):
        with pytest.raises(LimeError, match=f"--device {device} cannot be used: .*; give for example cpu or cuda:0"):
            evaluate.main(["--model", str(out), "--data", str(dataset), "--device", device])
    on_meta = ExportedModel(out, {}, open_export(out).model.to("meta"), None)
    assert original(on_meta, torch.zeros(1, 4, dtype=torch.long)).device.type == "meta", "nothing is copied back"


def test_a_megatron_pair_of_the_same_documents(
    trained: tuple[Path, float], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its validation split is what the run would hold out of it. A pair does not say its tokenizer, so a line does."""
    out, loss = trained
    held_out = [
        shard.document(i)
        for path in sorted(dataset.glob("validation-*.idx"))
        for shard in [IndexedDataset(path.with_suffix(""))]
        for i in range(len(shard))
    ]
    with IndexedWriter(tmp_path / "pair_text_document", "<i4") as writer:
        for document in (
            held_out * 100
        ):  # the export says data.validation_fraction=0.01, so that the last ones are held out
            writer.add_document(document)
    data = tmp_path / "pair_text_document"
    assert evaluate.evaluate(out, data, "validation", None, None) == pytest.approx(loss, rel=1e-5)
    assert f"{data}: does not say which tokenizer made it" in capsys.readouterr().out
    with IndexedWriter(tmp_path / "foreign", "<i4") as writer:
        for _ in range(100):
            writer.add_document(np.full(200, 50_000))
    for given, split, words in [
        (tmp_path / "foreign", "train", "holds tokens 50000 to 50000, but model.vocab_size="),
        (data, "test", "no split 'test'; a .bin/.idx pair has train, validation"),
        (
            tmp_path / "pair_text_document.bin",
            "validation",
            "is one file of a Megatron .bin/.idx pair; give its prefix",
        ),
    ]:
        with pytest.raises(LimeError, match=words):
            evaluate.evaluate(out, given, split, None, None)


def test_other_samples(trained: tuple[Path, float], dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, loss = trained
    evaluate.main(["--model", str(out), "--data", str(dataset), "--split", "train", "--samples", "3"])
    evaluate.main(["--model", str(out), "--data", str(dataset), "--sequence-length", "64", "--samples", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 train samples of 16 tokens of {dataset}"
    assert "validation samples of 64 tokens" in lines[2] and not lines[2].startswith("8 ")
    assert len({lines[1], lines[3], f"{loss:.6f}"}) == 3


def test_generate_continues_the_prompt(trained: tuple[Path, float], capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy text equals a loop over argmax; sampled text depends on the seed."""
    out, _ = trained
    exported = open_export(out)
    ids = torch.tensor([exported.tokenizer.encode("alpha beta")])
    for _ in range(12):
        ids = torch.cat((ids, exported.logits(ids)[:, -1:].argmax(-1)), 1)
    command = ["--model", str(out), "--prompt", "alpha beta", "--max-new-tokens", "12"]
    generate.main(command)
    assert capsys.readouterr().out == exported.tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    texts = []
    for seed in ("1", "1", "2"):
        options = ["--temperature", "1.5", "--top-p", "0.9", "--top-k", "50", "--seed", seed]
        generate.main([*command, *options])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and all(text.startswith("alpha beta") for text in texts)
    generate.main(["--model", str(out), "--prompt", "", "--max-new-tokens", "3"])
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--temperature", "-1"], "--temperature -1.0: must not be negative"),
        (["--temperature", "1", "--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["--temperature", "1", "--top-k", "0"], "--top-k 0: must be at least 1"),
        (["--top-k", "5"], "--top-k 5: has an effect only when sampling; add --temperature 1"),
        (["--seed", "5"], "--seed 5: has an effect only when sampling"),
        (["--prompt", "\udcff"], "--prompt: is not UTF-8 text"),
    ],
)
def test_options_of_generate(options: list[str], line: str) -> None:
    prompt = [] if "--prompt" in options else ["--prompt", "x"]
    with pytest.raises(LimeError, match=line):
        generate.main(["--model", "nowhere", *prompt, *options])


def test_a_tampered_export_is_one_line(trained: tuple[Path, float], dataset: Path, tmp_path: Path) -> None:
    """Both commands refuse it before they run any of its code."""
    out = tmp_path / "out"

    def line() -> str:
        lines = set()
        for command in (
            lambda: generate.main(["--model", str(out), "--prompt", "x"]),
            lambda: evaluate.main(["--model", str(out), "--data", str(dataset)]),
        ):
            with pytest.raises(LimeError) as caught:
                command()
            lines.add(str(caught.value))
        (message,) = lines
        assert "\n" not in message
        return message

    assert "no such folder; give the --output of lime_dist.checkpoint.export" in line()
    shutil.copytree(trained[0], out)
    shards = sorted(out.glob("model-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{shards[1]}: changed since the export" in line()
    shards[1].unlink()
    assert f"{shards[1]}: missing, though certificate.json lists it" in line()
    shards[1].write_bytes(content)
    code = out / "modeling_lime.py"
    code.write_text(code.read_text() + "\n")
    assert f"{code}: changed since the export" in line()
    (out / "certificate.json").write_text('{"format": "another"}')
    assert "was not written by this version" in line()
    (out / "certificate.json").unlink()
    assert "certificate.json: no such file; only the --output of lime_dist.checkpoint.export has one" in line()


def test_data_that_does_not_fit_is_one_line(trained: tuple[Path, float], dataset: Path, tmp_path: Path) -> None:
    def line(*options: str, data: Path = dataset) -> str:
        with pytest.raises(LimeError) as caught:
            evaluate.main(["--model", str(trained[0]), "--data", str(data), *options])
        return str(caught.value)

    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**description, "tokenizer_hash": "0" * 64}))
    assert "was tokenized with another tokenizer" in line(data=other)
    assert "no such folder" in line(data=tmp_path / "none")
    assert "no split 'tests'" in line("--split", "tests")
    assert "--samples 1000000: " in line("--samples", "1000000")
    assert "--samples -1: must be at least 0" in line("--samples", "-1")
    assert "--sequence-length 0: must be at least 1" in line("--sequence-length", "0")
    next(other.glob("validation-*.bin")).unlink()
    (other / "dataset.json").write_text(json.dumps(description))
    assert "missing, though dataset.json lists it" in line(data=other)


def test_without_transformers_the_extra_is_named(trained: tuple[Path, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LimeError, match="transformers is not installed; run pip install .*hf"):
        generate.main(["--model", str(trained[0]), "--prompt", "x"])


def test_the_commands_have_help_and_exit_with_2(tmp_path: Path) -> None:
    """Every command, in one process, shows an example in --help and prints one line on a mistake."""
    script = (
        "import sys, importlib\n"
        "from lime_dist.errors import run_command\n"
        "for name, wrong in (('lime_dist.generate', ['--model', 'no', '--prompt', 'x']),\n"
        "                    ('lime_dist.evaluate', ['--model', 'no', '--data', 'no']),\n"
        "                    ('lime_dist.exact_match', ['--model', 'no', '--data', 'no']),\n"
        "                    ('lime_dist.checkpoint.export', ['--checkpoint', 'no', '--output', 'out']),\n"
        "                    ('lime_dist.checkpoint.importing', ['--model', 'no', '--config', 'no']),\n"
        "                    ('lime_dist.checkpoint.compress', '--checkpoint no --output out --policy chunked --chunk-size 2 --rank 1'.split())):\n"
        "    main = importlib.import_module(name).main\n"
        "    for arguments in (['--help'], wrong):\n"
        "        try:\n"
        "            run_command(lambda: main(arguments))\n"
        "        except SystemExit as stop:\n"
        "            print('status', stop.code, flush=True)\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("status 0") == finished.stdout.count("status 2") == 6
    assert finished.stdout.count("example:\n  python -m lime_dist.") == 6
    errors = finished.stderr.splitlines()
    assert len(errors) == 6 and all(error.startswith("error: ") for error in errors)
    assert not list(tmp_path.iterdir())


def test_the_certificate_names_the_source(trained: tuple[Path, float], dataset: Path) -> None:
    certificate = verify(trained[0])
    assert certificate["source"]["step"] == 3 and certificate["source"]["consumed_samples"] == 12
    assert certificate["tokenizer"]["hash"] == Tokenizer(dataset / "tokenizer").hash
    assert certificate["tokenizer"]["compared_tokens"] > 5000
    assert set(certificate["versions"]) == {"lime_dist", "torch", "transformers"}


def test_other_uses_by_transformers(trained: tuple[Path, float], tmp_path: Path) -> None:
    """Without the head, with a cache of fixed size, with beam search, in bfloat16, changed and saved again."""
    exported = open_export(trained[0]).model
    prompt = torch.tensor([[5, 9, 2, 7]])
    greedy = {"max_new_tokens": 12, "do_sample": False}
    wanted = exported.generate(prompt, **greedy)
    assert torch.equal(exported.generate(prompt, cache_implementation="static", **greedy), wanted)
    assert exported.generate(prompt, num_beams=3, **greedy).shape[0] == 1
    with torch.no_grad():
        logits = exported(prompt).logits
        load = {"pretrained_model_name_or_path": trained[0], "trust_remote_code": True}
        body = transformers.AutoModel.from_pretrained(**load)
        torch.testing.assert_close(exported.lm_head(body(prompt).last_hidden_state), logits)
        half = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype=torch.bfloat16)
        assert half(prompt).logits.dtype == torch.bfloat16
        assert (half(prompt).logits - logits).abs().max() < 0.05 * logits.abs().max()
        exported.model.norm.weight *= 2
        exported.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        torch.testing.assert_close(again(prompt).logits, 2 * logits)
