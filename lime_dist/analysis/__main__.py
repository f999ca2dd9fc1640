"""Compare the internals of exported models: pictures, their numbers, and a page that shows them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lime_dist.analysis.findings import Findings, numbers
from lime_dist.analysis.page import make_page
from lime_dist.analysis.pictures import (
    draw_clouds,
    draw_entropy,
    draw_maps,
    draw_retrieval,
    draw_separability,
    make_palette,
    require_libraries,
)
from lime_dist.analysis.representations import EntropyByLayer, representations
from lime_dist.analysis.routes import DynamicWeights, frequent_types, routes_of
from lime_dist.analysis.words import MIN_OCCURRENCES, Occurrences, WordStates, count_words, find_words, word_tokens
from lime_dist.commands import CommandParser
from lime_dist.data.dataset import TokenSplit
from lime_dist.data.documents import MASK, find_eos
from lime_dist.data.files import json_bytes, write_atomic
from lime_dist.errors import LimeError, run_command
from lime_dist.export.exported import ExportedModel, check_vocabulary, open_verified, require_transformers, verify
from lime_dist.monitor.html import distinct_names
from lime_dist.paths import user_path

WORDS = "is,are,was,were"
LONGEST = 512
"""Most tokens per sample by default: an entropy computes the eigenvalues of a matrix of that size."""
CLOUDS = 4
"""Number of layers whose t-SNE clouds are drawn."""
PICTURES = ("entropy.png", "separability.png", "clouds.png", "routers.png", "retrieval.png")
EXAMPLE = """example:
  python -m lime_dist.analysis exported/quickstart exported/quickstart-llama --data data/quickstart/shards --output analysis

  entropy.png        matrix entropy of values and hidden states by layer
  separability.png   how well a linear classifier tells the words apart, by layer (k-fold cross-validation)
  clouds.png         t-SNE of the words' values
  routers.png        what layers read, one map per LIMe model; retrieval.png: statistics of the maps by layer
  index.html         all pictures, and the tokens to which a dynamic router responds; analysis.json: the numbers"""


def analyse_model(
    exported: ExportedModel,
    name: str,
    samples: Sequence[Tensor],
    words: Occurrences | None,
    seed: int,
    eos: int | None = None,
) -> Findings:
    """Run one model over the samples, [T] each, and summarise its representations. ``eos``: see `representations`."""
    entropies, dynamic = EntropyByLayer(), DynamicWeights(frequent_types(samples))
    states = None if words is None else WordStates(words)
    run = representations(exported, iter(samples), eos)
    for sample in tqdm(run, name, total=len(samples), unit="sample", disable=None):
        entropies.add(sample)
        dynamic.add(sample)
        if states is not None:
            states.add(sample)
    separability, layers, clouds = None, [], []
    if states is not None:
        separability = states.separability(seed, name)
        count = len(separability["values"])
        layers = sorted({max(0, round((i + 1) * count / CLOUDS) - 1) for i in range(CLOUDS)})
        clouds = states.clouds("values", layers, seed)
    return Findings(
        entropies.summary(), separability, (layers, clouds), routes_of(exported, dynamic), dynamic.routes(exported)
    )


def draw(output: Path, findings: dict[str, Findings], words: Occurrences | None) -> dict[str, Path]:
    """Draw all pictures for which there is data; returns their paths by title."""
    palette = make_palette(findings)
    entropies = {name: one.entropy for name, one in findings.items()}
    for name in PICTURES:
        (output / name).unlink(missing_ok=True)  # left by an earlier analysis
    drawn = {"Matrix entropy": draw_entropy(output / "entropy.png", entropies, palette)}
    if words is not None:
        separable = {name: one.separability for name, one in findings.items() if one.separability}
        clouds = {name: one.clouds for name, one in findings.items()}
        drawn["Linear separability of words"] = draw_separability(
            output / "separability.png", separable, palette, 1 / len(words.words)
        )
        drawn["Values of words (t-SNE)"] = draw_clouds(output / "clouds.png", clouds, words.labels, words.words)
    routes = {name: one.routes for name, one in findings.items() if one.routes}
    if routes:
        drawn["What layers read"] = draw_maps(output / "routers.png", routes)
        drawn["Retrieval"] = draw_retrieval(output / "retrieval.png", routes, palette)
    return drawn


def locate_words(
    exported: ExportedModel, samples: Sequence[Tensor], words: Sequence[str], most: int
) -> Occurrences | None:
    """Find the words in the samples, once for all models; prints which words cannot be used."""
    tokens, split_up = word_tokens(exported, words)
    if split_up:
        print(f"words left out (more than one token after a space in this vocabulary): {', '.join(split_up)}")
    occurrences = find_words(samples, tokens, most)
    counts = count_words(samples, tokens)
    rare = [f"{word} {count}" for word, count in counts.items() if count < MIN_OCCURRENCES]
    if occurrences is None and tokens:
        seen = ", ".join(f"{word} {count}" for word, count in counts.items())
        print(
            f"no pictures of words: at least two words must occur {MIN_OCCURRENCES} times, but the samples contain: {seen}; raise "
            "--samples or pass other --words"
        )
    elif occurrences is None:
        print("no pictures of words: pass other --words")
    else:
        if rare:
            print(f"words left out (fewer than {MIN_OCCURRENCES} occurrences in the samples): {', '.join(rare)}")
        print(f"words: {', '.join(occurrences.words)}, {occurrences.each} occurrences of each")
    return occurrences


def read_samples(
    options: argparse.Namespace, certificates: Sequence[dict[str, Any]]
) -> tuple[list[Tensor], list[int | None]]:
    """The first samples of the split, [T] each, and for each model the token that ends documents, None without
    ``data.document_mask``. By default T is the shortest sequence length of the runs, at most `LONGEST`.

    Raises:
        LimeError: the data cannot be read, have another vocabulary than the models, or do not name the token that ends documents.
    """
    vocabulary = min(certificate["tokenizer"]["vocab_size"] for certificate in certificates)
    split = TokenSplit(options.data, options.split, vocab_size=vocabulary)
    for folder, certificate in zip(options.models, certificates, strict=True):
        check_vocabulary(certificate, folder, split)
    length = options.sequence_length
    if length is None:
        length = min(LONGEST, *(certificate["training"]["sequence_length"] for certificate in certificates))
    count = min(options.samples, split.num_samples(length))
    runs = (certificate["training"] for certificate in certificates)
    ends = [find_eos(split, run.get("eos_token"), MASK) if run.get("document_mask") else None for run in runs]
    return [torch.from_numpy(split.sample(i, length)[:-1].astype("int64")) for i in range(count)], ends


def analyse(options: argparse.Namespace) -> None:
    """Analyse all models and write everything into ``--output``."""
    for flag, value, least in (
        ("--samples", options.samples, 1),
        ("--sequence-length", options.sequence_length, 2),
        ("--occurrences", options.occurrences, MIN_OCCURRENCES),
    ):
        if value is not None and value < least:
            raise LimeError(f"{flag} {value}: must be at least {least}")
    if not 0 <= options.seed < 2**32:
        raise LimeError(f"--seed {options.seed}: must be from 0 to {2**32 - 1}")
    asked = list(dict.fromkeys(word.strip() for word in options.words.split(",") if word.strip()))
    if len(asked) < 2:
        raise LimeError(f"--words {options.words}: pass at least two, as in --words {WORDS}")
    require_libraries()
    require_transformers()
    for index, folder in enumerate(options.models):
        if folder.resolve() in [other.resolve() for other in options.models[:index]]:
            raise LimeError(f"{folder}: is listed twice")
    names = distinct_names(options.models)
    certificates = [verify(folder) for folder in options.models]
    samples, ends = read_samples(options, certificates)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LimeError(f"--output {options.output} cannot be created: {error.strerror}") from None
    findings: dict[str, Findings] = {}
    words: Occurrences | None = None
    for name, folder, certificate, eos in zip(names, options.models, certificates, ends, strict=True):
        exported = open_verified(folder, certificate)
        if not findings:
            words = locate_words(exported, samples, asked, options.occurrences)
        findings[name] = analyse_model(exported, name, samples, words, options.seed, eos)
        del exported  # free it before the next one is loaded
    try:
        drawn = draw(options.output, findings, words)
        write_atomic(options.output / "analysis.json", json_bytes(numbers(findings, samples, words)))
        write_atomic(options.output / "index.html", make_page(drawn, findings, samples, words).encode())
    except OSError as error:
        raise LimeError(f"--output {options.output} cannot be written: {error.strerror}") from None
    for title, path in drawn.items():
        print(f"{title}: {path}")
    print(f"page: {options.output / 'index.html'}; numbers: {options.output / 'analysis.json'}")


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.analysis``."""
    parser = CommandParser(
        prog="python -m lime_dist.analysis",
        description=__doc__,
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "models", nargs="+", type=user_path, metavar="MODEL", help="the --output of lime_dist.checkpoint.export"
    )
    parser.add_argument("--data", required=True, type=user_path, help="folder of shards with the models' tokenizer")
    parser.add_argument("--output", type=user_path, default=Path("analysis"), help="folder (default: %(default)s)")
    parser.add_argument("--split", default="validation", help="default: %(default)s")
    parser.add_argument(
        "--samples", type=int, default=128, help="most samples, from the first on (default: %(default)s)"
    )
    parser.add_argument(
        "--sequence-length", type=int, help=f"tokens per sample (default: the runs', at most {LONGEST})"
    )
    parser.add_argument("--words", default=WORDS, help="similar words to tell apart (default: %(default)s)")
    parser.add_argument(
        "--occurrences", type=int, default=200, help="most occurrences of each word (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of folds and t-SNE (default: %(default)s)")
    analyse(parser.parse_args(arguments))


if __name__ == "__main__":
    run_command(main)
