"""Export a checkpoint of any layout as a Hugging Face model, after proving that it is the same model.

    OUT/config.json, generation_config.json, model*.safetensors, tokenizer files, README.md
    OUT/*_lime.py            modelling code; none for LLaMA, which is part of `transformers`
    OUT/certificate.json     source, measured differences, SHA-256 of every file

The files are written into a folder beside OUT, which is renamed to OUT once the export, loaded from it, has the logits of the
trainer's decoder.
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
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.files import json_bytes, sha256_file, write_atomic
from lime_dist.errors import LimeError
from lime_dist.export.comparison import TEXT, TOLERANCE, compare_logits, first_tokens
from lime_dist.export.exported import CERTIFICATE, FORMAT, load_model, load_tokenizer, require_transformers
from lime_dist.export.model_files import write_card, write_configuration, write_weights
from lime_dist.export.run_tokenizer import data_folder, open_run_tokenizer
from lime_dist.export.tokenizer_files import check_ids, special_ids, write_tokenizer


@dataclass(frozen=True)
class RunText:
    """The tokenizer of a run, and tokenized text to compare models on.

    Attributes:
        bos: whether documents began with bos in training.
        tokens_NT: tokens of the run's validation split, or of a built-in text if the split cannot be read.
        source: where the tokens come from, in words.
    """

    tokenizer: Tokenizer
    bos: bool
    tokens_NT: Tensor
    source: str


def run_text(config: Config, tokenizer_folder: Path | None) -> RunText:
    """Open the given tokenizer, by default the one that the run's shards were made with, and text to compare models on.

    Raises:
        LimeError: there is no tokenizer, it is not the one of the shards, or it has more pieces than the model's vocabulary.
    """
    data = data_folder(config.data)
    tokenizer, description = open_run_tokenizer(config, tokenizer_folder, "; give --tokenizer DIR")
    bos, length = bool(description.get("settings", {}).get("bos")), config.data.sequence_length
    if description.get("splits", {}).get("validation", {}).get("tokens", 0) > length:
        tokens = first_tokens(TokenSplit(data, "validation"), length)
        return RunText(tokenizer, bos, tokens, f"validation split of {data}")
    row = torch.tensor(tokenizer.encode(TEXT), dtype=torch.long).unsqueeze(0)
    return RunText(tokenizer, bos, row[:, :length], "built-in text")


def export(
    checkpoint: Path, output: Path, tokenizer_folder: Path | None, max_shard_size: str, dtype: str = "float32"
) -> dict[str, Any]:
    """Export a checkpoint to the folder ``output``.

    Args:
        dtype: type of the exported weights. Weights are rounded to it first, also for the comparison of logits.

    Returns:
        The certificate.

    Raises:
        LimeError: an argument is wrong, or the exported model differs from the checkpoint's. No files are left behind.
    """
    require_transformers()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LimeError(f"{output}: already exists; give another --output, or delete it")
    config, state, weights = read_weights(checkpoint)
    source = source_of(checkpoint)
    stored = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    weights = {name: weight.float() for name, weight in stored.items()}
    text = run_text(config, tokenizer_folder)
    final = output.absolute()
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_weights(partial, stored, max_shard_size)
        write_configuration(partial, config, special_ids(text.tokenizer, text.bos), dtype)
        write_tokenizer(text.tokenizer, text.bos, config.data.sequence_length, partial)
        write_card(partial, final.name, config, state.step, state.consumed_samples)
        source_facts = {"checkpoint": str(source.path), "manifest_sha256": source.manifest_sha256, **state.as_dict()}
        certificate = {**make_certificate(partial, config, weights, text, source_facts), "dtype": dtype}
        write_atomic(partial / CERTIFICATE, json_bytes(certificate))
        share_files(partial)
        if final.is_dir():
            final.rmdir()
        partial.rename(final)
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())  # one line; those of transformers have several
        raise LimeError(f"{error.filename or output}: {reason}; nothing was exported") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return certificate


def share_files(folder: Path) -> None:
    """Give every file the mode that the umask gives new files; libraries make some of them for their owner only."""
    for path in folder.iterdir():
        path.chmod((folder / CERTIFICATE).stat().st_mode)


def make_certificate(
    folder: Path, config: Config, weights: Weights, text: RunText, source: dict[str, Any]
) -> dict[str, Any]:
    """Compare the export in a folder with the checkpoint's model and tokenizer, and return its certificate.

    Args:
        source: which checkpoint the export comes from.

    Raises:
        LimeError: the logits or the token ids differ.
    """
    return {
        "format": FORMAT,
        "versions": {
            "lime_dist": lime_dist.__version__,
            "torch": torch.__version__,
            "transformers": require_transformers().__version__,
        },
        "source": source,
        "architecture": config.model.architecture,
        "logits": prove_logits(folder, config, weights, text),
        "tokenizer": prove_tokenizer(folder, text),
        "training": {
            "sequence_length": config.data.sequence_length,
            "evaluation_samples": config.train.evaluation_samples_or_default,
            "answer_token": config.data.answer_token,
            "validation_fraction": config.data.validation_fraction,
            "document_mask": config.data.document_mask,
            "eos_token": config.data.eos_token,
        },
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }


def prove_logits(folder: Path, config: Config, weights: Weights, text: RunText) -> dict[str, Any]:
    """Compare the export in a folder with the trainer's decoder on ``text``, at once and in two parts with the cache.

    The models are compared in float32 and, if they are more than TOLERANCE apart, in float64. A model of 128 layers with large
    weights can amplify the rounding of float32 so much that two equally correct orders of summation are farther apart than
    TOLERANCE (7e-5 was seen with random weights).

    Returns:
        The certificate's section ``logits``.

    Raises:
        LimeError: the logits differ by more than TOLERANCE.
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
        f"the exported model is not the trainer's: logits differ by up to {whole.difference:.1e}, with cache by up to "
        f"{cached.difference:.1e}; the largest logit is {whole.logit:.1e}, and {TOLERANCE} of it is allowed; nothing was "
        "exported"
    )


def prove_tokenizer(folder: Path, text: RunText) -> dict[str, Any]:
    """Compare the exported tokenizer with the trainer's on texts that are hard for tokenizers and on ``text``.

    Returns:
        The certificate's section ``tokenizer``.

    Raises:
        LimeError: token ids differ.
    """
    texts = [text.tokenizer.decode(row.tolist()) for row in text.tokens_NT]
    texts += [f"a {symbol}{symbol}1{symbol}" for symbol in text.tokenizer.facts.get("symbols", {})]
    compared = check_ids(text.tokenizer, load_tokenizer(folder), [*HARD_TEXTS, TEXT, *texts])
    return {"hash": text.tokenizer.hash, "vocab_size": text.tokenizer.vocab_size, **compared}
