"""Import a sentencepiece model or a Hugging Face tokenizer; it is accepted only if texts survive encoding and decoding."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import disk_errors
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.encoders import Encoder, make_encoder
from data_tools.tokenizer.facts import FACTS_FILE, FORMAT, tokenizer_facts
from data_tools.tokenizer.folder import existing_facts, replace_folder, write_scratch
from data_tools.tokenizer.huggingface_encoder import canonical
from data_tools.tokenizer.model_file import with_control_symbols
from data_tools.tokenizer.round_trip import HARD_TEXTS, failures
from lime_dist.data.files import json_bytes, lock_folder, read_json, sha256_file, write_atomic
from lime_dist.errors import LimeError
from lime_dist.paths import expand

# Their names in published vocabularies, used only if no tokenizer_config.json in the folder names them.
USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "pad": ("<pad>", "[PAD]"),
}
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
SHOWN_CHARACTERS, SHOWN_CHANGES = 24, 20
# Any 40 consecutive characters contain a place to cut; every kind of text that tokenizers treat differently occurs on
# both sides of such a place.
CUT_LIMITS = (40, 47, 61)
CUT_TEXT = """It's what (they) say: 3 or 12 dogs, e.g. "Rex" & co. don't run 1234567 miles...
for i in range(10):
    x[i] = f(y, 'z')  # Straße à l'été
a  b\tc \n d

e! ?f 漢字 かな 한글 текст 😀 😀 e\u0301 z\u200b y
<|x|> <s> </s> [SEP] ## he's we'LL I'd _a_ b- c's U.S.A. http://x.org/~y?z=%20 end
"""


def find_model(given: str) -> Path:
    """Return the model file that ``--model`` means, a file or a folder.

    Raises:
        LimeError: there is none, or there are several.
    """
    path = Path(given)
    if not path.is_dir():
        if not path.is_file():
            raise LimeError(f"--model {given}: no such file or folder; give a sentencepiece .model or a tokenizer.json")
        return path
    if (path / FACTS_FILE).exists():
        return path / FACTS_FILE
    candidates = sorted([*path.glob("*.model"), *path.glob("tokenizer.json")])
    if not candidates:
        raise LimeError(f"--model {given}: holds neither a .model file nor a tokenizer.json; give one of these")
    if len(candidates) > 1:
        names = " and ".join(file.name for file in candidates)
        raise LimeError(f"--model {given}: holds {names}; name the one to import (sentencepiece is faster)")
    return candidates[0]


def configured_names(folder: Path) -> dict[str, str]:
    """Return the names of bos, eos and pad that the files beside a model give."""
    names: dict[str, str] = {}
    for file in (folder / name for name in CONFIG_FILES):
        if file.is_file():
            content = read_json(file, "fix or remove it, and name the tokens with --eos, --bos and --pad")
            for name in USUAL_NAMES:
                token = content.get(f"{name}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    names.setdefault(name, token)
    return names


def choose_special_tokens(encoder: Encoder, options: argparse.Namespace, folder: Path) -> dict[str, tuple[str, int]]:
    """(token, id) of bos, eos and pad, ("", -1) for none.

    In order of precedence, they are named by an option, by a file beside the model, by the model, or by usual names.

    Raises:
        LimeError: a token is not in the vocabulary, or no eos is known.
    """
    configured, special, chosen = configured_names(folder), encoder.special_tokens(), {}
    by_id = {number: token for token, number in special.items()}
    for name in USUAL_NAMES:
        option = getattr(options, name)
        if option is not None and encoder.token_id(option) is None:
            raise LimeError(f"--{name} {option}: not in the vocabulary; its special tokens are {_list(special)}")
        usual = [token for token in USUAL_NAMES[name] if token in special]
        known = by_id.get(encoder.special_ids[name]) or (usual[0] if len(usual) == 1 else None)
        candidates = ((token, encoder.token_id(token)) for token in (option, configured.get(name), known) if token)
        chosen[name] = next(((token, number) for token, number in candidates if number is not None), ("", -1))
    if chosen["eos"][1] < 0:
        raise LimeError(
            f"--model {options.model}: no file says which token ends a document; name it with --eos (its special tokens "
            f"are {_list(special)})"
        )
    return chosen


def _list(tokens: dict[str, int]) -> str:
    return (", ".join(islice(tokens, 10)) + (", …" if len(tokens) > 10 else "")) or "none"


@dataclass(frozen=True)
class Source:
    """A model to import: its file, its content as it will be written, and (token, id) of bos, eos and pad."""

    path: Path
    kind: str
    model: bytes
    encoder: Encoder
    chosen: dict[str, tuple[str, int]]


def read_source(options: argparse.Namespace) -> Source:
    """Read the model that ``--model`` means.

    bos, eos and pad are made special in the copy, so that their text in a document is encoded as ordinary text.

    Raises:
        LimeError: it is not a model.
    """
    path = find_model(options.model)
    kind = "huggingface" if path.suffix == ".json" else "sentencepiece"
    content = read_json(path, "give a whole tokenizer.json") if kind == "huggingface" else {}
    if content.get("format") == FORMAT:
        raise LimeError(
            f"{path}: already a tokenizer of this program; give its folder to data_tools.pretokenize as it is"
        )
    if kind == "huggingface" and not isinstance(content.get("model"), dict):
        raise LimeError(
            f"{path}: not a Hugging Face tokenizer, it has no model; give a tokenizer.json or a .model file"
        )
    try:
        plain = canonical(content, {}) if kind == "huggingface" else path.read_bytes()
        encoder = make_encoder(kind, plain)
        chosen = choose_special_tokens(encoder, options, path.parent)
        ids = {token: number for token, number in chosen.values() if number >= 0}
        model = canonical(content, ids) if kind == "huggingface" else with_control_symbols(plain, set(ids.values()))
        return Source(path, kind, model, encoder if model == plain else make_encoder(kind, model), chosen)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "Hugging Face tokenizer" if kind == "huggingface" else "sentencepiece model"
        reason = f"{error!s:.200}".strip() or type(error).__name__
        raise LimeError(f"{path}: not a {what} ({reason}); give a tokenizer.json or a sentencepiece .model") from None


def cuts_are_exact(tokenizer: Tokenizer, encoder: Encoder) -> bool:
    """Whether encoding a long text in pieces gives the ids of the whole: no token crosses a cut, and a trial agrees."""
    if any(encoder.cut_rule.crossed.search(text) for text in encoder.token_texts()):
        return False
    whole = tokenizer.encode(CUT_TEXT)
    return all(np.array_equal(tokenizer.encode_in_pieces(CUT_TEXT, limit), whole) for limit in CUT_LIMITS)


def special_out_of_text(tokenizer: Tokenizer, source: Source) -> str | None:
    """Return a special token that encoding produces from text with special tokens' names or unusual characters, or None.

    A lossy tokenizer may produce its unknown token, unless that is bos, eos or pad.
    """
    special = source.encoder.special_tokens()
    texts = [text for token in special for text in (token, f"a{token}b", f" {token} ")]
    produced = set(np.concatenate(tokenizer.encode_batch([*texts, *HARD_TEXTS])).tolist())
    special.pop(source.encoder.unknown_token or "", None)
    special |= {token: number for token, number in source.chosen.values() if token}
    return next((token for token, number in special.items() if number in produced), None)


def describe_change(text: str, decoded: str) -> str:
    """Show a text and its decoded form around their first difference."""
    length = min(len(text), len(decoded))
    place = next((i for i in range(length) if text[i] != decoded[i]), length)
    shown = slice(max(0, place - SHOWN_CHARACTERS // 4), place + SHOWN_CHARACTERS)
    return f"{text[shown]!a} is decoded as {decoded[shown]!a}"  # escaped, as some differences are invisible


def import_model(source: Source, output: Path, allow_loss: bool, fresh: bool) -> None:
    """Write the tokenizer into a scratch folder, check it there, and move it into ``output``, which otherwise stays as it is.

    Raises:
        LimeError: the tokenizer loses text, or ``output`` holds another one.
    """
    existing = existing_facts(output)  # before anything is written
    encoder, path = source.encoder, source.path
    imported = {"file": path.name, "sha256": sha256_file(path)}
    ids = {name: number for name, (_, number) in source.chosen.items()}
    facts = tokenizer_facts(encoder, source.kind, source.model, ids, imported=imported)
    scratch = write_scratch(output, source.model, facts)
    try:
        tokenizer = Tokenizer(scratch)
        token = special_out_of_text(tokenizer, source)
        if token is not None:
            raise LimeError(
                f"{path}: the text {token!r} in a document would become the special token; name another token or model"
            )
        texts = [*HARD_TEXTS, *(f"a{token}b {token} c" for token in encoder.whole_tokens())]
        changes = [describe_change(text, decoded) for text, decoded in failures(tokenizer, texts)]
        if changes and not allow_loss:
            raise LimeError(f"{path}: changes texts: {changes[0]}; accept that with --allow-loss")
        facts |= {"exact": not changes, "cuttable": cuts_are_exact(tokenizer, encoder)}
        write_atomic(scratch / FACTS_FILE, json_bytes(facts))
        reused = existing is not None and not fresh
        if existing and reused and any(existing.get(key) != facts[key] for key in facts if key != "imported"):
            raise LimeError(f"{output}: holds another tokenizer; give another --output, or --fresh to replace it")
        if reused:
            Tokenizer(output)
        else:
            replace_folder(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"tokenizer {'complete, reused' if reused else 'imported'}: {encoder.vocab_size} ids in {output}")
    print(
        ", ".join(
            f"{name} {token!r} ({number})" if token else f"no {name}" for name, (token, number) in source.chosen.items()
        )
    )
    if encoder.holes:
        print(f"{encoder.holes} ids below {encoder.vocab_size} have no token; each still takes a row of the embedding")
    if not facts["cuttable"]:
        print("long texts are not cut for encoding, because tokens of this vocabulary would cross the cuts")
    for change in changes[:SHOWN_CHANGES]:
        print(f"changed: {change}")
    print(f"{len(texts) - len(changes)} of {len(texts)} test texts are decoded exactly")


def add_arguments(commands: Any) -> None:
    """Add the sub-command with its options."""
    parser = commands.add_parser(
        "import",
        help="Import a sentencepiece model or a Hugging Face tokenizer.json.",
        description="Import a sentencepiece model or a Hugging Face tokenizer.json. It is accepted if a set of test texts\n"
        "is decoded exactly. The text of its special tokens in a document is encoded as ordinary text.",
        epilog="examples:\n"
        "  python -m data_tools.tokenizer import --model llama/tokenizer.model --output data/tokenizer\n"
        "  python -m data_tools.tokenizer import --model gpt2/tokenizer.json --eos '<|endoftext|>' --output data/tokenizer",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model", type=expand, required=True, help="a sentencepiece .model, a tokenizer.json, or a folder with one"
    )
    parser.add_argument("--output", type=expand, required=True, help="folder for the tokenizer")
    for name, what in (("eos", "ends documents"), ("bos", "may begin them"), ("pad", "fills batches")):
        about = f"the token that {what} (default: as {CONFIG_FILES[0]} beside the model, or the model, says)"
        parser.add_argument(f"--{name}", metavar="TOKEN", help=about)
    parser.add_argument(
        "--allow-loss", action="store_true", help="accept a tokenizer that changes texts, and list the changes"
    )
    parser.add_argument("--fresh", action="store_true", help="replace another tokenizer in the folder")


def run(options: argparse.Namespace) -> None:
    """``python -m data_tools.tokenizer import``."""
    with disk_errors("fix this and run the same command again"):
        source, output = read_source(options), Path(options.output)
        with lock_folder(output):
            import_model(source, output, options.allow_loss, options.fresh)
