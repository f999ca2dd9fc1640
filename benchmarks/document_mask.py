"""Count what `data.document_mask` leaves of attention, and measure a training step with it and without it, alternately, in one process.

Documents are drawn: a log-normal distribution with FineWeb-Edu's mean of 1,030 tokens (its card: 10 billion GPT-2 tokens in 9.7 million
documents of sample-10BT) and the shape of its text (mean over median 1.46), or the lengths of the documents of --shards. They are
concatenated and cut into samples.

The table gives, by length of a sample: keys that a token reads, the pairs of a query and a key that are left, the blocks of 128 × 128
pairs that flex attention computes (of those that causal attention computes), and FLOPs of a step of --config. With --time: tokens per
second with the mask over those without it, by round.

examples:
  python benchmarks/document_mask.py
  python benchmarks/document_mask.py --shards work/shards --lengths 2048 8192
  python benchmarks/document_mask.py --lengths 1024 2048 --time --layers 4 --hidden 256
  python benchmarks/document_mask.py --lengths 2048 8192 --time --layers 16 --hidden 2048 --device cuda --dtype bf16
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from training_step import Subject, step_seconds

from lime_dist import build_decoder, load_config
from lime_dist.data.dataset import read_dataset_json
from lime_dist.data.documents import positions
from lime_dist.data.indexed import IndexedDataset
from lime_dist.errors import LimeError, run_command
from lime_dist.model.blocks import compile_layers
from lime_dist.model.cost import head_flops, layer_flops
from lime_dist.model.documents import BLOCK, block_mask, document_starts
from lime_dist.paths import user_path

MEAN, SHAPE = 1030, 1.46
"""Tokens of a document of FineWeb-Edu: the mean, and the mean over the median."""
SAMPLES = 4000
EOS = 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=user_path, help="folder whose documents' lengths are taken (default: FineWeb-Edu's)"
    )
    parser.add_argument(
        "--config", type=user_path, default=Path("configs/paper/llama.yaml"), help="model whose FLOPs are counted"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192], help="tokens per sample"
    )
    parser.add_argument("--time", action="store_true", help="measure steps, too")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--hidden", type=int, default=256, help="hidden size; heads have 64 elements, SwiGLU four times as much"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a batch")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count; one comes before them")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def document_lengths(shards: Path | None) -> np.ndarray:
    """Return lengths of documents, in random order."""
    generator = np.random.default_rng(0)
    if shards is None:
        spread = np.sqrt(2 * np.log(SHAPE))
        drawn = generator.lognormal(np.log(MEAN / SHAPE), spread, 200_000)
        return np.maximum(2, drawn.round()).astype(np.int64)
    lengths = []
    for shard in read_dataset_json(shards)["splits"]["train"]["shards"]:
        documents = IndexedDataset(shards / shard["name"])
        bounds = np.concatenate([[0], np.cumsum(documents.lengths, dtype=np.int64)])[documents.document_bounds]
        lengths.append(np.diff(bounds))
    return generator.permutation(np.concatenate(lengths))


def samples(lengths: np.ndarray, length: int, count: int) -> np.ndarray:
    """Return [count, length] tokens: EOS at the end of a document, 1 elsewhere."""
    repeated = np.tile(lengths, -(-count * length // int(lengths.sum())))
    ends = np.cumsum(repeated) - 1
    tokens = np.ones(count * length, dtype=np.int64)
    tokens[ends[ends < count * length]] = EOS
    return tokens.reshape(count, length)


def count(lengths: np.ndarray, length: int, config: Path) -> list[str]:
    """Return a row of the table."""
    tokens = samples(lengths, length, min(SAMPLES, max(64, 1 << 22 // length)))
    read = float(positions(tokens, EOS).mean()) + 1
    mask = block_mask(document_starts(torch.from_numpy(tokens[:256]), EOS))
    assert mask.full_kv_num_blocks is not None
    computed = float((mask.kv_num_blocks + mask.full_kv_num_blocks).float().sum()) / len(tokens[:256])
    blocks = -(-length // BLOCK)
    model = load_config(config, []).model
    plain, left = (
        sum(flops.both for flops in layer_flops(model, attended)) + head_flops(model).both
        for attended in (length, 2 * read - 1)
    )
    return [
        f"{length:,}", f"{read:,.0f}", f"{2 * read / (length + 1):.0%}", f"{computed / (blocks * (blocks + 1) / 2):.0%}",
        f"{left / plain:.1%}",
    ]  # fmt: skip


def measure(arguments: argparse.Namespace, lengths: np.ndarray, length: int) -> list[str]:
    """Return the median ratio of tokens per second with the mask to those without it, the least and the largest."""
    size, device = arguments.hidden, torch.device(arguments.device)
    overrides = [
        "model.architecture=llama", f"model.hidden_size={size}", f"model.intermediate_size={4 * size}",
        f"model.num_hidden_layers={arguments.layers}", f"model.num_attention_heads={max(1, size // 64)}",
    ]  # fmt: skip
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    decoder = build_decoder(load_config(None, overrides).model, device=device, dtype=dtype)
    if (reason := compile_layers(decoder.get_submodule("model.layers").children(), device, "auto")) is not None:
        print(reason)
    tokens = torch.from_numpy(samples(lengths, length, max(1, arguments.tokens // length))).to(device)
    starts = document_starts(tokens, EOS)
    subjects = [Subject(decoder, lambda given: decoder(given, starts)), Subject(decoder, decoder)]
    ratios = []
    for turn in range(1 + arguments.rounds):
        order = subjects if turn % 2 else subjects[::-1]
        seconds = {id(subject): step_seconds(subject, (tokens, tokens)) for subject in order}
        ratios.append(seconds[id(subjects[1])] / seconds[id(subjects[0])])
    ratios = ratios[1:]
    return [f"{value:.2f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    arguments = parse()
    if min(arguments.lengths) < 2 or arguments.rounds < 1 or arguments.threads < 1:
        raise LimeError("--lengths must be at least 2, --rounds and --threads at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise LimeError("--device cuda: torch finds no GPU here; leave the option out to measure on the CPU")
    torch.set_num_threads(arguments.threads)
    lengths = document_lengths(arguments.shards)
    print(f"{len(lengths):,} documents, {lengths.mean():,.0f} tokens on average, median {np.median(lengths):,.0f}\n")
    head = ["tokens per sample", "keys read per token", "pairs", "blocks", "FLOPs of a step"]
    rows = [count(lengths, length, arguments.config) for length in arguments.lengths]
    if arguments.time:
        head += ["tokens/s with over without", "least", "largest"]
        rows = [
            [*row, *measure(arguments, lengths, length)] for row, length in zip(rows, arguments.lengths, strict=True)
        ]
    print(table(head, rows))


if __name__ == "__main__":
    run_command(main)
