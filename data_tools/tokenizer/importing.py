"""Take over an existing sentencepiece model or Hugging Face tokenizer, and accept it only if texts come back exactly."""

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

# What the published vocabularies call them; only where the folder has no tokenizer_config.json that says it.
USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "pad": ("<pad>", "[PAD]"),
}
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
SHOWN_CHARACTERS, SHOWN_LOSSES = 24, 20
# Every stretch of 40 characters has a place to cut; all that tokenizers treat apart stands on both sides of one.
CUT_LIMITS = (40, 47, 61)
CUT_TEXT = """It's what (they) say: 3 or 12 dogs, e.g. "Rex" & co. don't run 1234567 miles...
for i in range(10):
    x[i] = f(y, 'z')  # Straße à l'été
a  b\tc \n d

e! ?f 漢字 かな 한글 текст 😀 😀 e\u0301 z\u200b y
<|x|> <s> </s> [SEP] ## he's we'LL I'd _a_ b- c's U.S.A. http://x.org/~y?z=%20 end
"""


def find_model(given: str) -> Path:
    """The model file that is meant by a file or a folder."""
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
    """What the files beside a model say about bos, eos and pad."""
    names: dict[str, str] = {}
    for file in (folder / name for name in CONFIG_FILES):
        if file.is_file():
            content = read_json(file, "mend or remove it, and name the tokens with --eos, --bos and --pad")
            for name in USUAL_NAMES:
                token = content.get(f"{name}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    names.setdefault(name, token)
    return names


def choose_special_tokens(encoder: Encoder, options: argparse.Namespace, folder: Path) -> dict[str, tuple[str, int]]:
    """(token, id) of bos, eos and pad, ("", -1) for none: as named by hand, beside the model, in it, or as usual."""
    configured, special, chosen = configured_names(folder), encoder.special_tokens(), {}
    by_id = {number: token for token, number in special.items()}
    for name in USUAL_NAMES:
        by_hand = getattr(options, name)
        if by_hand is not None and encoder.token_id(by_hand) is None:
            raise LimeError(f"--{name} {by_hand}: not in the vocabulary; its special tokens are {_list(special)}")
        usual = [token for token in USUAL_NAMES[name] if token in special]
        known = by_id.get(encoder.special_ids[name]) or (usual[0] if len(usual) == 1 else None)
        found = ((token, encoder.token_id(token)) for token in (by_hand, configured.get(name), known) if token)
        chosen[name] = next(((token, number) for token, number in found if number is not None), ("", -1))
    if chosen["eos"][1] < 0:
        raise LimeError(
            f"--model {options.model}: which token ends a document is not said; name it with --eos (its special tokens "
            f"are {_list(special)})"
        )
    return chosen


def _list(tokens: dict[str, int]) -> str:
    return (", ".join(islice(tokens, 10)) + (", …" if len(tokens) > 10 else "")) or "none"


@dataclass(frozen=True)
class Source:
    """A model to import: its file, its content as it will be kept, and (token, id) of bos, eos and pad."""

    path: Path
    kind: str
    model: bytes
    encoder: Encoder
    chosen: dict[str, tuple[str, int]]


def read_source(options: argparse.Namespace) -> Source:
    """What ``--model`` means; LimeError if that is no model.

    bos, eos and pad are made special in the copy where they are not, so that their text in a document is only text.
    """
    path = find_model(options.model)
    kind = "huggingface" if path.suffix == ".json" else "sentencepiece"
    content = read_json(path, "give a whole tokenizer.json") if kind == "huggingface" else {}
    if content.get("format") == FORMAT:
        raise LimeError(f"{path}: is a tokenizer of this program; give its folder to data_tools.pretokenize as it is")
    if kind == "huggingface" and not isinstance(content.get("model"), dict):
        raise LimeError(f"{path}: no Hugging Face tokenizer, it has no model; give a tokenizer.json or a .model file")
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
        raise LimeError(f"{path}: no {what} ({reason}); give a tokenizer.json or a sentencepiece .model") from None


def cuts_are_exact(tokenizer: Tokenizer, encoder: Encoder) -> bool:
    """Whether long texts can be encoded in pieces with the ids of the whole: no token crosses, and a trial agrees."""
    if any(encoder.cut_rule.crossed.search(text) for text in encoder.token_texts()):
        return False
    whole = tokenizer.encode(CUT_TEXT)
    return all(np.array_equal(tokenizer.encode_in_pieces(CUT_TEXT, limit), whole) for limit in CUT_LIMITS)


def special_out_of_text(tokenizer: Tokenizer, source: Source) -> str | None:
    """A special token that comes out of documents with special tokens' text or strange characters in them, or None.

    That for unknown characters may come out of a lossy tokenizer, unless it is bos, eos or pad.
    """
    special = source.encoder.special_tokens()
    texts = [text for token in special for text in (token, f"a{token}b", f" {token} ")]
    found = set(np.concatenate(tokenizer.encode_batch([*texts, *HARD_TEXTS])).tolist())
    special.pop(source.encoder.unknown_token or "", None)
    special |= {token: number for token, number in source.chosen.values() if token}
    return next((token for token, number in special.items() if number in found), None)


def show_loss(text: str, back: str) -> str:
    """A text and what came back, around the first difference."""
    place = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    shown = slice(max(0, place - SHOWN_CHARACTERS // 4), place + SHOWN_CHARACTERS)
    return f"{text[shown]!a} came back as {back[shown]!a}"  # escaped: some differences cannot be seen


def take_over(source: Source, output: Path, allow_loss: bool, fresh: bool) -> None:
    """Write beside, check, and move into ``output``; nothing there changes unless all of it went well."""
    standing = existing_facts(output)  # before anything is written
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
                f"{path}: the text {token!r} in a document would become the special token; give another token or model"
            )
        texts = [*HARD_TEXTS, *(f"a{token}b {token} c" for token in encoder.whole_tokens())]
        lost = [show_loss(text, back) for text, back in failures(tokenizer, texts)]
        if lost and not allow_loss:
            raise LimeError(f"{path}: does not give every text back: {lost[0]}; accept that with --allow-loss")
        facts |= {"exact": not lost, "cuttable": cuts_are_exact(tokenizer, encoder)}
        write_atomic(scratch / FACTS_FILE, json_bytes(facts))
        reused = standing is not None and not fresh
        if standing and reused and any(standing.get(key) != facts[key] for key in facts if key != "imported"):
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
        print(f"{encoder.holes} ids below {encoder.vocab_size} name no token; they cost rows of the embedding")
    if not facts["cuttable"]:
        print("texts of any length are encoded whole: its tokens cross the places where others are cut")
    for loss in lost[:SHOWN_LOSSES]:
        print(f"lost: {loss}")
    print(f"{len(texts) - len(lost)} of {len(texts)} texts for the check came back exactly")


def add_arguments(commands: Any) -> None:
    """The sub-command and its options."""
    parser = commands.add_parser(
        "import",
        help="Take over a sentencepiece model or a Hugging Face tokenizer.json.",
        description="Take over a sentencepiece model or a Hugging Face tokenizer.json. It is accepted if every text of a\n"
        "check comes back exactly. The text of its special tokens in a document is encoded as text.",
        epilog="examples:\n"
        "  python -m data_tools.tokenizer import --model llama/tokenizer.model --output data/tokenizer\n"
        "  python -m data_tools.tokenizer import --model gpt2/tokenizer.json --eos '<|endoftext|>' --output data/tokenizer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, help="a sentencepiece .model, a tokenizer.json, or a folder with one")
    parser.add_argument("--output", required=True, help="folder for the tokenizer")
    for name, what in (("eos", "ends documents"), ("bos", "may begin them"), ("pad", "fills batches")):
        about = f"the token that {what} (default: as {CONFIG_FILES[0]} beside the model, or the model, says)"
        parser.add_argument(f"--{name}", metavar="TOKEN", help=about)
    parser.add_argument("--allow-loss", action="store_true", help="accept a tokenizer that changes texts; say how")
    parser.add_argument("--fresh", action="store_true", help="replace another tokenizer in the folder")


def run(options: argparse.Namespace) -> None:
    """``python -m data_tools.tokenizer import``."""
    with disk_errors("put this right and run the same command again"):
        source, output = read_source(options), Path(options.output)
        with lock_folder(output):
            take_over(source, output, options.allow_loss, options.fresh)
