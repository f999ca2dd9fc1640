"""Protects the import of existing models: what is accepted, what is refused and why, and that no file is harmed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from support.old_tokenizers import copy_as_old
from support.vocabularies import gpt_2, llama_2, llama_3, train_sentencepiece
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data_tools import inspect
from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.__main__ import main
from data_tools.tokenizer.facts import FACTS_FILE, OLD_FACTS_FILE
from data_tools.tokenizer.model_file import read_pieces, read_settings, with_control_symbols, without_dummy_prefix
from lime_dist.data.files import read_json
from lime_dist.data.indexed import IndexedDataset
from lime_dist.errors import LimeError, run_command


def import_model(model: Path, output: Path, *options: str) -> Tokenizer:
    main(["import", "--model", str(model), "--output", str(output), *options])
    return Tokenizer(output)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A sentencepiece model."""
    return train_sentencepiece()


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """A GPT-2-like tokenizer.json."""
    return json.loads(gpt_2().to_str())


def write(path: Path, value: dict[str, Any] | bytes | str | tokenizers.Tokenizer) -> Path:
    """Write a file of bytes, text, JSON or a tokenizer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif isinstance(value, tokenizers.Tokenizer):
        value.save(str(path))
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_the_folder_and_its_facts(byte_level: dict[str, Any], pieces: bytes, tmp_path: Path) -> None:
    one = import_model(write(tmp_path / "tokenizer.json", byte_level), tmp_path / "t")
    assert sorted(content(tmp_path / "t")) == [".lock", "huggingface.json", "tokenizer_facts.json"]
    assert (one.facts["kind"], one.facts["model_type"], one.exact) == ("huggingface", "bpe", True)
    assert (one.vocab_size, one.eos_id, one.bos_id, one.pad_id) == (700, 0, -1, -1)
    two = import_model(write(tmp_path / "any.model", pieces), tmp_path / "s")
    assert (tmp_path / "s" / "tokenizer.model").read_bytes() == pieces
    assert (two.facts["kind"], two.vocab_size, two.bos_id, two.eos_id, two.pad_id) == ("sentencepiece", 600, 1, 2, -1)
    padded = import_model(tmp_path / "any.model", tmp_path / "p", "--pad", "<unk>")
    assert padded.decode([0, padded.eos_id, 0]) == "" != two.decode([0])
    two.copy_to(tmp_path / "copy")
    one.copy_to(tmp_path / "copy")
    assert sorted(content(tmp_path / "copy")) == ["huggingface.json", "tokenizer_facts.json"]
    assert Tokenizer(tmp_path / "copy").hash == one.hash != two.hash


def test_a_trained_model_imports_as_itself(trained: Tokenizer, tmp_path: Path) -> None:
    assert import_model(trained.folder / "tokenizer.model", tmp_path / "t").hash == trained.hash


def test_shards_of_an_imported_tokenizer(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From end to end: pretokenize uses the folder, documents begin and end with its ids, inspect decodes them."""
    import_model(write(tmp_path / "tokenizer.json", llama_3()), tmp_path / "t")
    given = [
        "--input",
        str(corpus / "c.jsonl"),
        "--tokenizer",
        str(tmp_path / "t"),
        "--output",
        str(tmp_path / "shards"),
    ]
    pretokenize([*given, "--workers", "1", "--bos"])
    facts = read_json(tmp_path / "shards" / "dataset.json", "")
    assert (facts["bos_id"], facts["eos_id"], facts["pad_id"], facts["vocab_size"]) == (800, 801, -1, 803)
    inspect.main([str(tmp_path / "shards"), "--verify"])
    assert "Document 3-" in capsys.readouterr().out


def test_the_choice_of_special_tokens(pieces: bytes, tmp_path: Path) -> None:
    """From options, else tokenizer_config.json, else special_tokens_map.json, else the model itself, else usual names."""
    file = write(tmp_path / "a" / "tokenizer.json", llama_3())
    config = {
        "bos_token": {"content": "<|begin_of_text|>", "lstrip": False},
        "eos_token": "<|eot_id|>",
        "pad_token": None,
    }

    def ids(*options: str) -> tuple[int, int, int]:
        one = import_model(file, tmp_path / "t", "--fresh", *options)
        return one.bos_id, one.eos_id, one.pad_id

    assert ids() == (800, 801, -1)
    write(tmp_path / "a" / "special_tokens_map.json", {"pad_token": "<|eot_id|>", "eos_token": "<|end_of_text|>"})
    assert ids() == (800, 801, 802)
    write(tmp_path / "a" / "tokenizer_config.json", config)
    assert ids() == (800, 802, 802)
    assert ids("--eos", "<|end_of_text|>", "--pad", "<|begin_of_text|>") == (800, 801, 800)
    with pytest.raises(LimeError, match=r"--eos </s>: not in the vocabulary; its special tokens are <\|begin_of_text"):
        ids("--eos", "</s>")
    write(tmp_path / "b" / "any.model", pieces)
    write(tmp_path / "b" / "tokenizer_config.json", {"eos_token": "nothing that it has"})
    assert import_model(tmp_path / "b", tmp_path / "s").eos_id == 2  # what the model says
    write(tmp_path / "b" / "tokenizer_config.json", "{")
    with pytest.raises(LimeError, match="tokenizer_config.json: cannot be read .*name the tokens with --eos"):
        import_model(tmp_path / "b", tmp_path / "s")


@pytest.mark.parametrize(
    "make", [lambda: gpt_2(special_tokens=["<x>"]), lambda: gpt_2(special_tokens=["</s>", "<eos>"])]
)
def test_a_model_that_does_not_say_its_eos(make: Callable[[], tokenizers.Tokenizer], tmp_path: Path) -> None:
    file = write(tmp_path / "tokenizer.json", make())
    with pytest.raises(
        LimeError, match=r"no file says which token ends a document; name it with --eos \(its special to"
    ):
        import_model(file, tmp_path / "t")


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_an_ordinary_token_as_eos_becomes_special(kind: str, byte_level: dict[str, Any], tmp_path: Path) -> None:
    """Otherwise its text in a document would end the document."""
    if kind == "sentencepiece":
        file = write(tmp_path / "any.model", train_sentencepiece(user_defined_symbols=["<|end|>"]))
    else:
        added = byte_level["added_tokens"][0] | {"id": 700, "content": "<|end|>", "special": False}
        file = write(tmp_path / "tokenizer.json", byte_level | {"added_tokens": [*byte_level["added_tokens"], added]})
    one = import_model(file, tmp_path / "t", "--eos", "<|end|>")
    ids = one.encode("a<|end|>b")
    assert one.eos_id not in ids and one.decode(ids) == "a<|end|>b" and one.decode([one.eos_id]) == ""


def test_importing_again(
    byte_level: dict[str, Any], pieces: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write(tmp_path / "tokenizer.json", byte_level), tmp_path / "t"
    first = import_model(file, output)
    before = content(output)
    capsys.readouterr()
    import_model(write(tmp_path / "b" / "tokenizer.json", json.dumps(byte_level, indent=4)), output)
    assert "complete, reused: 700 ids" in capsys.readouterr().out and content(output) == before
    other, text = write(tmp_path / "any.model", pieces), write(tmp_path / "in.jsonl", {"text": "x"})
    with pytest.raises(LimeError, match="holds another tokenizer; give another --output, or --fresh to replace it"):
        import_model(other, output)
    with pytest.raises(LimeError, match="holds a tokenizer that was imported; give another --output, or --fresh"):
        main(["train", "--input", str(text), "--output", str(output), "--vocab-size", "300"])
    assert content(output) == before
    (output / ".new").mkdir()  # left by a killed import
    assert import_model(other, output, "--fresh").hash != first.hash
    assert sorted(content(output)) == [".lock", "tokenizer.model", "tokenizer_facts.json"]


def test_a_folder_of_another_program_is_not_harmed(byte_level: dict[str, Any], pieces: bytes, tmp_path: Path) -> None:
    """Importing a model into its own folder, with or without --fresh, is refused and changes nothing."""
    file = write(tmp_path / "a" / "tokenizer.json", byte_level)
    model = write(tmp_path / "b" / "tokenizer.model", pieces)
    for given in (file, model):
        for options in ([], ["--fresh"]):
            with pytest.raises(LimeError, match=f"holds a {given.name} that is not this program's; give another --out"):
                import_model(given, given.parent, *options)
    assert read_json(file, "") == byte_level and model.read_bytes() == pieces


def test_equal_encoders_have_equal_hashes(byte_level: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the file's layout and padding settings; different encoders have different hashes."""
    numbers = iter(range(100))

    def hash_of(change: dict[str, Any], *options: str) -> str:
        folder = tmp_path / str(next(numbers))
        return import_model(write(folder / "tokenizer.json", byte_level | change), folder / "t", *options).hash

    model = byte_level["model"]
    same = hash_of({})
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    assert hash_of({"padding": padding, "post_processor": None}) == same
    old_style = {key: value for key, value in model.items() if key not in ("type", "ignore_merges")}
    old_style["merges"] = [" ".join(pair) for pair in model["merges"]]
    assert hash_of({"model": old_style | {"dropout": 0.1}}) == same
    assert hash_of({"model": model | {"merges": model["merges"][:-1]}}) != same
    assert hash_of({"normalizer": {"type": "NFC"}}, "--allow-loss") != same
    assert hash_of({}, "--bos", "<|endoftext|>") != same != hash_of({}, "--pad", "<|endoftext|>")


def test_no_dropout_and_no_truncation(byte_level: dict[str, Any], tmp_path: Path) -> None:
    cut_short = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    changed = byte_level | {"model": byte_level["model"] | {"dropout": 0.5}, "truncation": cut_short}
    one = import_model(write(tmp_path / "tokenizer.json", changed), tmp_path / "t")
    text = "Licensed under the terms and conditions for use " * 5
    assert len({one.encode(text).tobytes() for _ in range(5)}) == 1 and one.decode(one.encode(text)) == text


def lossy(kind: str) -> tokenizers.Tokenizer | bytes:
    if kind == "nmt_nfkc":
        return train_sentencepiece(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    if kind == "no bytes":
        return train_sentencepiece(byte_fallback=False, vocab_size=300)
    if kind == "word pieces":
        words = ["[UNK]", "[SEP]", "</s>", "a", "##b", "the"]
        tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.add_special_tokens(["[UNK]", "[SEP]", "</s>"])
        return tokenizer
    if kind == "missing bytes":
        return gpt_2(initial_alphabet=[])
    tokenizer = gpt_2()
    changes: dict[str, Any] = {"lowercase": normalizers.Lowercase(), "nfc": normalizers.NFC()}
    tokenizer.normalizer = changes.get(kind) or normalizers.Strip()
    return tokenizer


@pytest.mark.parametrize(
    "kind,shown",
    [
        ("nmt_nfkc", "' ' is decoded as ''"),
        ("no bytes", r"is decoded as ' \u2047"),
        ("word pieces", "' ' is decoded as ''"),
        ("missing bytes", "is decoded as"),
        ("lowercase", r"'UPPER Case \u0130"),
        ("nfc", r", \xe9, e\u0301' is decoded as '"),
        ("strip", "' ' is decoded as ''"),
    ],
)
def test_a_tokenizer_that_loses_text(kind: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with a text and its decoded form; accepted with --allow-loss, which its facts record."""
    model = lossy(kind)
    file = write(tmp_path / ("any.model" if isinstance(model, bytes) else "tokenizer.json"), model)
    with pytest.raises(LimeError, match="changes texts: .*accept that with --allow-loss") as refusal:
        import_model(file, tmp_path / "t")
    assert shown in str(refusal.value) and "\n" not in str(refusal.value)
    assert list(content(tmp_path / "t")) == [".lock"]
    capsys.readouterr()
    one = import_model(file, tmp_path / "t", "--allow-loss")
    assert one.exact is False and one.facts["exact"] is False
    output = capsys.readouterr().out
    assert shown in output and "test texts are decoded exactly" in output
    with pytest.raises(LimeError, match="changes texts"):  # even if the folder holds one imported with --allow-loss
        import_model(file, tmp_path / "t")


def test_text_that_would_become_special_is_refused(byte_level: dict[str, Any], tmp_path: Path) -> None:
    """A letter as eos; a unigram model, which finds its </s> in texts like any piece; the token for unknown words.

    --allow-loss does not help. An unknown token that is never needed may be eos, as in some versions of GPT-2's.
    """
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "abc</s>")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.add_special_tokens(["</s>"])
    unknown = byte_level | {"model": byte_level["model"] | {"unk_token": "<|endoftext|>"}}
    assert import_model(write(tmp_path / "u" / "tokenizer.json", unknown), tmp_path / "u" / "t").eos_id == 0
    letters = models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    for name, model, eos in (
        ("a", byte_level, "a"),
        ("b", tokenizer, "</s>"),
        ("c", tokenizers.Tokenizer(letters), "<unk>"),
    ):
        file = write(tmp_path / name / "tokenizer.json", model)
        with pytest.raises(LimeError, match=f"the text '{eos}' in a document would become the special token"):
            import_model(file, tmp_path / "t", "--allow-loss", "--eos", eos)


def without(value: dict[str, Any], *path: str) -> dict[str, Any]:
    head, *rest = path
    return {k: without(v, *rest) if k == head else v for k, v in value.items() if rest or k != head}


@pytest.mark.parametrize(
    "name,change,message",
    [
        (
            "tokenizer.json",
            lambda good: json.dumps(good)[:5000],
            r"tokenizer.json: cannot be read \(.*give a whole tok",
        ),
        ("tokenizer.json", lambda good: "[1, 2]", "holds no JSON object"),
        ("tokenizer.json", lambda good: without(good, "model"), "not a Hugging Face tokenizer, it has no model"),
        (
            "tokenizer.json",
            lambda good: without(good, "model", "vocab"),
            r"not a Hugging Face tokenizer \(.*; give a tok",
        ),
        ("tokenizer.json", lambda good: good | {"model": {"type": "Novel"}}, r"not a Hugging Face tokenizer \("),
        ("tokenizer.json", lambda good: good | {"added_tokens": [7]}, r"not a Hugging Face tokenizer \("),
        ("tokenizer.json", lambda good: good | {"decoder": {"type": "Novel"}}, r"not a Hugging Face tokenizer \("),
        (
            "tokenizer.json",
            lambda good: good | {"model": good["model"] | {"vocab": good["model"]["vocab"] | {"a": 5}}},
            "two tokens have the same id",
        ),
        (
            "tokenizer.json",
            lambda good: good | {"model": good["model"] | {"vocab": good["model"]["vocab"] | {"far": 10**6}}},
            "its 701 tokens have ids up to 1000000",
        ),
        (
            "tokenizer.model",
            lambda good: b"IQ== 0\nIg== 1\n" * 50,
            r"not a sentencepiece model \(",
        ),  # tiktoken's format
        ("tokenizer.model", lambda good: b"", r"not a sentencepiece model \(the file is empty\)"),
        ("tokenizer.model", lambda good: train_sentencepiece()[:3000], r"not a sentencepiece model \("),
        ("readme.txt", lambda good: "text", "holds neither a .model file nor a tokenizer.json"),
    ],
)
def test_an_invalid_model_is_a_one_line_error(
    name: str,
    change: Callable[[dict[str, Any]], Any],
    message: str,
    byte_level: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "in" / name, change(byte_level))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(["import", "--model", str(tmp_path / "in"), "--output", str(tmp_path / "t")]))
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert re.search(message, errors), errors
    assert not (tmp_path / "t").exists()


def test_the_choice_of_the_model_file(
    byte_level: dict[str, Any], pieces: bytes, trained: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(LimeError, match="nowhere: no such file or folder"):
        import_model(tmp_path / "nowhere", tmp_path / "t")
    write(tmp_path / "in" / "tokenizer.json", byte_level)
    write(tmp_path / "in" / "tokenizer.model", pieces)
    with pytest.raises(LimeError, match="holds tokenizer.json and tokenizer.model; name the one to import"):
        import_model(tmp_path / "in", tmp_path / "t")
    for given in (
        trained.folder,
        trained.folder / FACTS_FILE,
        copy_as_old(trained.folder, tmp_path / "old") / OLD_FACTS_FILE,
    ):
        with pytest.raises(
            LimeError, match="json: already a tokenizer of this program; give its folder to data_tools.pre"
        ):
            import_model(given, tmp_path / "t")


def test_holes_in_the_vocabulary_are_reported(
    byte_level: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They take rows of the embedding and have no other effect."""
    vocabulary = byte_level["model"]["vocab"] | {"far away": 710}
    file = write(tmp_path / "tokenizer.json", byte_level | {"model": byte_level["model"] | {"vocab": vocabulary}})
    one = import_model(file, tmp_path / "t")
    assert one.vocab_size == 711 and one.decode([705]) == ""
    assert "10 ids below 711 have no token" in capsys.readouterr().out


def test_without_the_package(byte_level: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "tokenizer.json", byte_level)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(LimeError, match=r"needs the package tokenizers, .* pip install 'lime_dist\[hf\]'"):
        import_model(file, tmp_path / "t")


def test_a_damaged_folder_is_refused_when_opened(byte_level: dict[str, Any], tmp_path: Path) -> None:
    import_model(write(tmp_path / "tokenizer.json", byte_level), tmp_path / "t")
    facts = read_json(tmp_path / "t" / FACTS_FILE, "")
    for change, message in (
        ({"kind": "novel"}, "damaged, kind is invalid"),
        ({"eos_id": None}, "damaged, eos_id is invalid"),
        ({"eos_id": 5}, "its pieces do not match the hash in tokenizer_facts.json"),
        ({"model_sha256": "0"}, "its content does not match the hash in tokenizer_facts.json"),
        ({"kind": "sentencepiece"}, "tokenizer.model: missing, although tokenizer_facts.json exists"),
    ):
        shutil.copytree(tmp_path / "t", tmp_path / "d", dirs_exist_ok=True)
        write(tmp_path / "d" / FACTS_FILE, facts | change)
        with pytest.raises(LimeError, match=message):
            Tokenizer(tmp_path / "d")


def test_a_space_mark_is_encoded_as_its_bytes(pieces: bytes, tmp_path: Path) -> None:
    """A space mark in a text becomes three bytes, in a sentencepiece model and in its Hugging Face form."""
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    spelt = [model.piece_to_id(f"<0x{byte:02X}>") for byte in b"\xe2\x96\x81"]
    for file in (write(tmp_path / "any.model", pieces), write(tmp_path / "tokenizer.json", llama_2(pieces))):
        one = import_model(file, tmp_path / file.stem)
        assert one.encode("\u2581").tolist() == spelt
        np.testing.assert_array_equal(one.encode("a\u2581")[-3:], spelt)


def test_model_files_are_read_and_changed_as_protobuf_would(pieces: bytes) -> None:
    """Compared with the classes that sentencepiece ships, which need a recent enough protobuf (the pinned one is)."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    suffix = train_sentencepiece(treat_whitespace_as_suffix=True, model_type="unigram", vocab_size=450)
    for model in (pieces, suffix, train_sentencepiece(normalization_rule_name="nfkc", user_defined_symbols=["|"])):
        read, changed = ModelProto.FromString(model), ModelProto.FromString(model)
        settings, normalizer = read_settings(model), read.normalizer_spec
        assert settings.character_map == normalizer.precompiled_charsmap
        assert settings.add_dummy_prefix is normalizer.add_dummy_prefix is True
        assert settings.remove_extra_whitespaces is normalizer.remove_extra_whitespaces is False
        assert settings.escape_whitespaces is normalizer.escape_whitespaces is True
        assert settings.treat_whitespace_as_suffix is read.trainer_spec.treat_whitespace_as_suffix
        assert settings.model_type == ("unigram" if model == suffix else "bpe")
        assert read_pieces(model) == [(piece.piece, piece.type, piece.score) for piece in read.pieces]
        changed.normalizer_spec.add_dummy_prefix = False
        assert ModelProto.FromString(without_dummy_prefix(model)) == changed
        for number in (3, 300, 400):
            read.pieces[number].type = 3
        assert ModelProto.FromString(with_control_symbols(model, {0, 1, 3, 300, 400})) == read
        assert with_control_symbols(model, {0, 1, 2}) == model


@pytest.mark.parametrize("command", ["train", "import"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"python -m data_tools.tokenizer {command} --" in capsys.readouterr().out


def test_a_vocabulary_without_bos_makes_shards(corpus: Path, tmp_path: Path) -> None:
    """As GPT-2's: its eos ends documents, and --bos is refused before anything is written."""
    gpt_2().save(str(tmp_path / "tokenizer.json"))
    main(["import", "--model", str(tmp_path / "tokenizer.json"), "--output", str(tmp_path / "imported")])
    tokenizer = Tokenizer(tmp_path / "imported")
    assert tokenizer.bos_id == -1
    common = ["--input", str(corpus / "c.jsonl"), "--tokenizer", str(tmp_path / "imported"), "--workers", "1"]
    pretokenize([*common, "--output", str(tmp_path / "shards"), "--validation-fraction", "0"])
    data = IndexedDataset(tmp_path / "shards" / "train-00000-00")
    assert data.document(0)[-1] == tokenizer.eos_id and tokenizer.decode(data.document(0)).startswith("Document 3-0.")
    with pytest.raises(LimeError, match="--bos: the tokenizer in .* has no bos"):
        pretokenize([*common, "--output", str(tmp_path / "other"), "--bos"])
    assert not (tmp_path / "other").exists()
