"""Export a checkpoint of any layout as a Hugging Face model, and prove that it is the same model before it gets its name.

    OUT/config.json, generation_config.json, model*.safetensors, tokenizer files, README.md
    OUT/*_lime.py            modelling code; not for LLaMA, which `transformers` knows
    OUT/certificate.json     source, measured differences, SHA-256 of every file

Everything is written beside OUT, and renamed when the loaded export has the logits of the trainer's decoder.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lime_dist
from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.round_trip import HARD_TEXTS
from lime_dist.checkpoint.reading import Weights, load_decoder, read_weights, source_of
from lime_dist.config.schema import Config
from lime_dist.data.dataset import TokenSplit, read_dataset_json
from lime_dist.data.files import json_bytes, sha256_file, write_atomic
from lime_dist.errors import LimeError
from lime_dist.export.comparison import TEXT, TOLERANCE, compare_logits, first_tokens
from lime_dist.export.exported import CERTIFICATE, FORMAT, load_model, load_tokenizer, require_transformers
from lime_dist.export.model_files import write_card, write_configuration, write_weights
from lime_dist.export.tokenizer_files import check_ids, special_ids, write_tokenizer


@dataclass(frozen=True)
class RunText:
    """The tokenizer of a run, and text in its tokens.

    Attributes:
        bos: documents began with bos.
        tokens_NT: of the run's validation split, where it can be read.
        source: where the tokens are from.
    """

    tokenizer: Tokenizer
    bos: bool
    tokens_NT: Tensor
    source: str


def run_text(config: Config, tokenizer_folder: Path | None) -> RunText:
    """Open the tokenizer that a run's shards were made with, or the given one, and text to compare models on.

    Raises:
        LimeError: neither can be read, they differ, or the model has too small a vocabulary.
    """
    data = Path(next((path for path in config.data.paths if Path(path).is_dir()), config.data.paths[0]))
    description: dict[str, Any] = {}
    try:
        description = read_dataset_json(data)
        if tokenizer_folder is None:
            tokenizer_folder = data / description["tokenizer"]
    except LimeError as error:
        if tokenizer_folder is None:
            raise LimeError(f"the run's shards cannot be read ({error}); or give --tokenizer DIR") from None
    tokenizer = Tokenizer(tokenizer_folder)
    if description and description["tokenizer_hash"] != tokenizer.hash:
        raise LimeError(f"{tokenizer_folder}: is not the tokenizer that {data} was made with; leave --tokenizer out")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise LimeError(
            f"{tokenizer_folder}: has {tokenizer.vocab_size} pieces, but model.vocab_size={config.model.vocab_size}; "
            "give the run's own tokenizer"
        )
    bos, length = bool(description.get("settings", {}).get("bos")), config.data.sequence_length
    if description.get("splits", {}).get("validation", {}).get("tokens", 0) > length:
        tokens = first_tokens(TokenSplit(data, "validation"), length)
        return RunText(tokenizer, bos, tokens, f"validation split of {data}")
    row = torch.tensor(tokenizer.encode(TEXT), dtype=torch.long).unsqueeze(0)
    return RunText(tokenizer, bos, row[:, :length], "a text that the program carries")


def export(checkpoint: Path, output: Path, tokenizer_folder: Path | None, max_shard_size: str) -> dict[str, Any]:
    """Write ``output``; returns its certificate.

    Raises:
        LimeError: something given is wrong, or the result is not the same model; nothing is left of it then.
    """
    versions = {"lime_dist": lime_dist.__version__, "torch": torch.__version__}
    versions["transformers"] = require_transformers().__version__
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LimeError(f"{output}: is there already; give another --output, or delete it")
    config, state, weights = read_weights(checkpoint)
    source = source_of(checkpoint)
    text = run_text(config, tokenizer_folder)
    final = output.absolute()
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_weights(partial, weights, max_shard_size)
        write_configuration(partial, config, special_ids(text.tokenizer, text.bos))
        write_tokenizer(text.tokenizer, text.bos, config.data.sequence_length, partial)
        write_card(partial, final.name, config, state.step, state.consumed_samples)
        certificate = {
            "format": FORMAT,
            "versions": versions,
            "source": {"checkpoint": str(source.path), "manifest_sha256": source.manifest_sha256, **state.as_dict()},
            "architecture": config.model.architecture,
            "logits": prove_logits(partial, config, weights, text),
            "tokenizer": prove_tokenizer(partial, text),
            "training": {
                "sequence_length": config.data.sequence_length,
                "evaluation_samples": config.train.evaluation_samples,
                "answer_token": config.data.answer_token,
            },
            "files": {path.name: sha256_file(path) for path in sorted(partial.iterdir()) if path.is_file()},
        }
        write_atomic(partial / CERTIFICATE, json_bytes(certificate))
        if final.is_dir():
            final.rmdir()
        partial.rename(final)
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())  # transformers' own have several lines
        raise LimeError(f"{error.filename or output}: {reason}; nothing was exported") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return certificate


def prove_logits(folder: Path, config: Config, weights: Weights, text: RunText) -> dict[str, Any]:
    """Compare the export in a folder with the trainer's decoder on real text, as a whole and in two parts with the cache.

    In float32, and if that does not suffice in float64: a model of 128 layers with large weights can multiply float32's
    rounding so much that two exact orders of summation are more than TOLERANCE apart (7e-5 seen with random weights).

    Raises:
        LimeError: they differ by more than TOLERANCE.
    """
    decoder, exported = load_decoder(config.model, weights), load_model(folder)

    def at_once(tokens_BT: Tensor) -> Tensor:
        return exported(tokens_BT, use_cache=False).logits

    def in_two_parts(tokens_BT: Tensor) -> Tensor:
        half = (tokens_BT.shape[1] + 1) // 2
        first = exported(tokens_BT[:, :half], use_cache=True)
        if half == tokens_BT.shape[1]:
            return first.logits
        second = exported(tokens_BT[:, half:], past_key_values=first.past_key_values, use_cache=True)
        return torch.cat((first.logits, second.logits), 1)

    for dtype in (torch.float32, torch.float64):
        decoder, exported = decoder.to(dtype), exported.to(dtype)
        whole = compare_logits(decoder, at_once, text.tokens_NT)
        cached = compare_logits(decoder, in_two_parts, text.tokens_NT)
        if max(whole.relative, cached.relative) <= TOLERANCE:
            return {
                "text": text.source,
                "tokens": whole.tokens,
                "precision": str(dtype).removeprefix("torch."),
                "largest_logit": whole.logit,
                "largest_difference": whole.difference,
                "largest_difference_with_cache": cached.difference,
                "allowed": TOLERANCE * whole.logit,
            }
    raise LimeError(
        f"the exported model is not the trainer's: logits differ by {whole.difference:.1e}, with cache by "
        f"{cached.difference:.1e}, of at most {whole.logit:.1e}; {TOLERANCE} of that is allowed; nothing was exported"
    )


def prove_tokenizer(folder: Path, text: RunText) -> dict[str, Any]:
    """Compare the exported tokenizer's ids with those of the trainer's, on hard and on real text."""
    real = [text.tokenizer.decode(row.tolist()) for row in text.tokens_NT]
    real += [f"a {symbol}{symbol}1{symbol}" for symbol in text.tokenizer.facts.get("symbols", {})]
    compared = check_ids(text.tokenizer, load_tokenizer(folder), [*HARD_TEXTS, TEXT, *real])
    return {"hash": text.tokenizer.hash, "vocab_size": text.tokenizer.vocab_size, **compared}
