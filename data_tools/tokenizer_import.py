"""Take over an existing sentencepiece model or Hugging Face tokenizer, and accept it only if texts come back exactly."""

from __future__ import annotations

import argparse
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import disk_errors
from data_tools.tokenizer import FACTS_FILE, FORMAT, Encoder, Tokenizer, failures, make_encoder
from data_tools.tokenizer_folder import HARD_TEXTS, existing_facts, replace_folder, tokenizer_facts, write_beside
from data_tools.tokenizer_huggingface import canonical
from data_tools.tokenizer_sentencepiece import with_control_symbols
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
    found = sorted([*path.glob("*.model"), *path.glob("tokenizer.json")])
    if not found:
        raise LimeError(f"--model {given}: holds neither a .model file nor a tokenizer.json; give one of these")
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise LimeError(f"--model {given}: holds {names}; name the one to import (sentencepiece is the faster one)")
    return found[0]


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


def choose_special_ids(encoder: Encoder, options: argparse.Namespace, folder: Path) -> dict[str, tuple[str, int]]:
    """(token, id) of bos, eos and pad, ("", -1) for none: as named by hand, beside the model, in it, or as usual."""
    configured, special, chosen = configured_names(folder), encoder.special_tokens(), {}
    by_id = {number: token for token, number in special.items()}
    for name in USUAL_NAMES:
        by_hand = getattr(options, name)
        usual = [token for token in USUAL_NAMES[name] if token in special]
        known = by_id.get(encoder.special_ids[name]) or (usual[0] if len(usual) == 1 else "")
        for token in (by_hand, configured.get(name), known):
            number = encoder.token_id(token) if token else None
            if token == by_hand and token is not None and number is None:
                raise LimeError(f"--{name} {token}: not in the vocabulary; its special tokens are {_list(special)}")
            if token and number is not None:
                chosen[name] = (token, number)
                break
        else:
            chosen[name] = ("", -1)
    if chosen["eos"][1] < 0:
        raise LimeError(
            f"--model {options.model}: which token ends a document is not said; name it with --eos (its special tokens "
            f"are {_list(special)})"
        )
    return chosen


def _list(tokens: dict[str, int]) -> str:
    return (", ".join(islice(tokens, 10)) + (", …" if len(tokens) > 10 else "")) or "none"


def read_model(options: argparse.Namespace) -> tuple[str, bytes, Encoder, dict[str, tuple[str, int]], Path]:
    """(kind, the model file's content as it will be kept, its encoder, bos/eos/pad, the file) of ``--model``.

    bos, eos and pad are made special in the copy where they are not, so that their text in a document is only text.
    """
    path = find_model(options.model)
    kind = "huggingface" if path.suffix == ".json" else "sentencepiece"
    source = read_json(path, "give a whole tokenizer.json") if kind == "huggingface" else {}
    if source.get("format") == FORMAT:
        raise LimeError(f"{path}: is a tokenizer of this program; give its folder to data_tools.pretokenize as it is")
    if kind == "huggingface" and not isinstance(source.get("model"), dict):
        raise LimeError(f"{path}: no Hugging Face tokenizer, it has no model; give a tokenizer.json or a .model file")
    try:
        plain = canonical(source, {}) if kind == "huggingface" else path.read_bytes()
        encoder = make_encoder(kind, plain)
        chosen = choose_special_ids(encoder, options, path.parent)
        ids = {token: number for token, number in chosen.values() if number >= 0}
        model = canonical(source, ids) if kind == "huggingface" else with_control_symbols(plain, set(ids.values()))
        return kind, model, encoder if model == plain else make_encoder(kind, model), chosen, path
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "Hugging Face tokenizer" if kind == "huggingface" else "sentencepiece model"
        raise LimeError(
            f"{path}: no {what} ({error!s:.200}); give a tokenizer.json or a sentencepiece .model"
        ) from None


def cuts_are_exact(tokenizer: Tokenizer, encoder: Encoder) -> bool:
    """Whether long texts can be encoded in pieces with the ids of the whole: no token crosses, and a trial agrees."""
    if any(encoder.cut_rule.crossed.search(text) for text in encoder.token_texts()):
        return False
    whole = tokenizer.encode(CUT_TEXT)
    return all(np.array_equal(tokenizer.encode_in_pieces(CUT_TEXT, limit), whole) for limit in CUT_LIMITS)


def special_out_of_text(tokenizer: Tokenizer, special: dict[str, int]) -> str | None:
    """A special token that comes out of a document with special tokens' text in it, or None."""
    texts = [text for token in special for text in (token, f"a{token}b", f" {token} ")]
    found = set(np.concatenate([np.empty(0, dtype=np.int32), *tokenizer.encode_batch(texts)]).tolist())
    return next((token for token, number in special.items() if number in found), None)


def show_loss(text: str, back: str) -> str:
    """A text and what came back, around the first difference."""
    place = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    shown = slice(max(0, place - SHOWN_CHARACTERS // 4), place + SHOWN_CHARACTERS)
    return f"{text[shown]!a} came back as {back[shown]!a}"  # escaped: some differences cannot be seen


def take_over(options: argparse.Namespace, output: Path) -> None:
    """Read, write beside, check, and move into ``output``; nothing there changes unless all of it went well."""
    kind, model, encoder, chosen, path = read_model(options)
    standing = existing_facts(output)  # before anything is written
    ids = {name: number for name, (_, number) in chosen.items()}
    imported = {"file": path.name, "sha256": sha256_file(path)}
    facts = tokenizer_facts(encoder, kind, model, ids, imported=imported)
    scratch = write_beside(output, model, facts)
    try:
        tokenizer, special = Tokenizer(scratch), encoder.special_tokens()
        token = special_out_of_text(tokenizer, special)
        if token is not None:
            raise LimeError(
                f"{path}: the text {token!r} in a document would become the special token; give another token or model"
            )
        texts = [*HARD_TEXTS, *(f"a{token}b {token} c" for token in encoder.whole_tokens())]
        lost = [show_loss(text, back) for text, back in failures(tokenizer, texts)]
        if lost and not options.allow_loss:
            raise LimeError(f"{path}: does not give every text back: {lost[0]}; accept that with --allow-loss")
        facts |= {"exact": not lost, "cuttable": cuts_are_exact(tokenizer, encoder)}
        write_atomic(scratch / FACTS_FILE, json_bytes(facts))
        reused = standing is not None and not options.fresh
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
        ", ".join(f"{name} {token!r} ({number})" if token else f"no {name}" for name, (token, number) in chosen.items())
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
    output = Path(options.output)
    with disk_errors("put this right and run the same command again"), lock_folder(output):
        take_over(options, output)
