"""Compress a trained key/value model with a `full` history into one with a `chunked` history: a low-rank fit of its routers.

The weights with which the layers after a chunk read the chunk's slots form a matrix B: rows (layer, head), columns (layer of
the chunk, head). A summary of r rows can represent B ≈ Q·A with A [r·G, c·G]. The best such product is the singular value
decomposition of B, truncated to r·G values (Eckart and Young): A is the leading right singular vectors, and Q of each later
layer its rows of B·Aᵀ. The first j slots are read directly (P), so they stay exact and the fit leaves them out. What a layer
reads within its own chunk (R) does not change. If B has fewer than r·G nonzero singular values, the remaining rows of A
complete it to an orthonormal set; training can use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lime_dist.checkpoint.reading import Weights, load_decoder, read_weights
from lime_dist.checkpoint.writing import write_checkpoint
from lime_dist.commands import CommandParser
from lime_dist.config.load import dump_config, make_config
from lime_dist.config.schema import Config
from lime_dist.data.answers import find_counted
from lime_dist.data.blend import open_training, open_validation
from lime_dist.data.documents import MASK, find_eos
from lime_dist.data.files import write_atomic
from lime_dist.data.identity import DataIdentity
from lime_dist.errors import LimeError, run_command
from lime_dist.export.comparison import Logits, mean_loss, validation_batches
from lime_dist.model.architecture import CHUNKS, architecture_of
from lime_dist.model.architectures.lime.kv.architecture import KeyValueLime
from lime_dist.model.chunks import Chunk, summarised_chunks
from lime_dist.model.decoder import Decoder
from lime_dist.model.documents import document_starts
from lime_dist.model.policies import FullHistory, make_policy
from lime_dist.paths import user_path

EXAMPLE = """example:
  python -m lime_dist.checkpoint.compress --checkpoint runs/full --policy chunked --chunk-size 8 --rank 2 --first 2 \\
    --output runs/chunked
  deepspeed --num_gpus 2 pretrain.py --config runs/chunked/config.yaml train.steps=1000"""


@dataclass(frozen=True)
class Fit:
    """How well a chunk's summary represents its slots.

    Attributes:
        chunk: index of the chunk.
        size: squared norm of the weights that are fitted.
        left: squared norm of the residual.
    """

    chunk: int
    size: float
    left: float


def chunked_config(config: Config, chunk_size: int, num_rows: int, first: int, output: Path) -> Config:
    """The configuration of the compressed run.

    Raises:
        LimeError: the model has no full key/value history, or the numbers do not fit the model.
    """
    model = config.model
    architecture = architecture_of(model)
    if not isinstance(architecture, KeyValueLime) or not isinstance(architecture.policy, FullHistory):
        raise LimeError(
            f"model.architecture={model.architecture}, model.lime.routes={model.lime.routes}, "
            f"model.lime.depth_attention={model.lime.depth_attention}, model.lime.history.policy={model.lime.history.policy}: "
            "only lime, kv, none, full can be compressed"
        )
    values = config.model_dump(mode="json")
    history = {"policy": "chunked", "chunk_size": chunk_size, "rank": num_rows, "first": first}
    values["model"]["lime"]["history"] = history
    values["run"]["directory"] = str(output)
    compressed = make_config(values, "the command line")
    if not summarised_chunks(make_policy(compressed.model.lime), model.num_hidden_layers):
        raise LimeError(
            f"--chunk-size {chunk_size}: no layer comes after a whole chunk, model.num_hidden_layers={model.num_hidden_layers}; "
            "give a smaller chunk size"
        )
    return compressed


def compress_weights(config: Config, weights: Weights) -> tuple[Weights, list[Fit]]:
    """The weights of the chunked model whose routers are nearest to those of a full model.

    Args:
        config: configuration of the chunked model.
        weights: weights of the full model.
    """
    model, history = config.model, config.model.lime.history
    heads, layers = model.key_value_heads, model.num_hidden_layers
    chunk_size, first = history.chunk_size or 1, history.first or 0
    routers = {layer: weights[_router(layer)].double() for layer in range(1, layers)}
    compressed = dict(weights)
    summaries: dict[int, list[Tensor]] = {layer: [] for layer in routers}
    fits = []
    for chunk in summarised_chunks(make_policy(model.lime), layers):
        later = range(chunk.layers.stop, layers)
        block = torch.cat([_columns(routers[layer], chunk, heads) for layer in later])
        if chunk.index == 0:
            block[:, : first * heads] = 0
        _, _, right = torch.linalg.svd(block, full_matrices=True)
        basis = right[: chunk.num_rows * heads]
        compressed[f"{CHUNKS}{chunk.index}.weight"] = basis.float()
        fitted = block @ basis.t()
        for layer, rows in zip(later, fitted.split(heads), strict=True):
            summaries[layer].append(rows)
        left = block - fitted @ basis
        fits.append(Fit(chunk.index, block.pow(2).sum().item(), left.pow(2).sum().item()))
    for layer, parts in summaries.items():
        if parts:
            begin = layer - layer % chunk_size
            compressed[_router(layer, "summary_")] = torch.cat(parts, 1).float()
            compressed[_router(layer)] = routers[layer][:, begin * heads :].float()
            if first:
                compressed[_router(layer, "first_")] = routers[layer][:, : first * heads].float()
    return compressed, fits


def _router(layer: int, kind: str = "") -> str:
    return f"model.layers.{layer}.self_attn.router.{kind}weight"


def _columns(router: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """The columns of a full router with which it reads a chunk's slots."""
    return router[:, chunk.layers.start * heads : chunk.layers.stop * heads].clone()


def masked_logits(decoder: Decoder, eos: int | None) -> Logits:
    """The decoder's logits; within documents if ``eos`` is the token that ends them."""
    return lambda tokens_BT: decoder(tokens_BT, None if eos is None else document_starts(tokens_BT, eos))


def compress(
    checkpoint: Path, output: Path, chunk_size: int, num_rows: int, first: int, samples: int | None
) -> tuple[float, float]:
    """Write a run folder with the compressed model, from which training continues.

    The new run starts at step 0 with optimizer states of zero, and at the sample at which the old run stopped.

    Returns:
        Validation loss before and after compression.

    Raises:
        LimeError: an argument does not fit, or ``output`` holds checkpoints already.
    """
    config, state, weights = read_weights(checkpoint)
    compressed = chunked_config(config, chunk_size, num_rows, first, output)
    length = config.data.sequence_length
    training, _ = open_training(config.data, config.model.vocab_size)
    validation = open_validation(config.data, config.model.vocab_size)
    samples = samples or min(config.train.evaluation_samples_or_default, validation.num_samples(length)) or 1
    counted = find_counted(validation, config.data)
    share = counted.share(validation, length, samples) if counted is not None else None
    eos = find_eos(validation, config.data.eos_token, MASK) if config.data.document_mask else None
    new_weights, fits = compress_weights(compressed, weights)
    before, after = (
        mean_loss(
            masked_logits(load_decoder(version.model, values), eos),
            validation_batches(validation, length, samples, counted),
            counted_share=share,
        )
        for version, values in ((config, weights), (compressed, new_weights))
    )
    identity = DataIdentity.of(training, length)
    write_checkpoint(output / "checkpoints", compressed, identity, new_weights, state.consumed_samples)
    write_atomic(output / "config.yaml", dump_config(compressed).encode())
    for fit in fits:
        print(
            f"chunk {fit.chunk}: {fit.left / fit.size if fit.size else 0:.2%} of the squared router weights that its summary represents are lost"
        )
    size, left = sum(fit.size for fit in fits), sum(fit.left for fit in fits)
    print(f"routers: {left / size if size else 0:.2%} of the squared router weights that summaries represent are lost")
    print(f"loss {before:.4f} before, {after:.4f} after ({samples} validation samples of {length} tokens)")
    print(f"written: {output}; continue training with pretrain.py --config {output / 'config.yaml'} train.steps=…")
    return before, after


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.checkpoint.compress``."""
    parser = CommandParser(
        prog="python -m lime_dist.checkpoint.compress",
        description="Compress the full history of a trained model into a bounded one, by a low-rank fit of its routers.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--checkpoint", required=True, type=user_path, help="run folder, its checkpoints, or one global_stepN"
    )
    parser.add_argument("--output", required=True, type=user_path, help="run folder to write")
    parser.add_argument("--policy", required=True, choices=("chunked",), help="history policy of the compressed model")
    parser.add_argument("--chunk-size", required=True, type=int, help="layers per chunk")
    parser.add_argument("--rank", required=True, type=int, help="rows of a chunk summary; at most the chunk size")
    parser.add_argument(
        "--first", type=int, default=0, help="number of first layers whose slots are read directly (default 0)"
    )
    parser.add_argument("--samples", type=int, help="validation samples for the two losses (default: as in the run)")
    options = parser.parse_args(arguments)
    if options.samples is not None and options.samples < 1:
        raise LimeError(f"--samples {options.samples}: must be at least 1")
    compress(options.checkpoint, options.output, options.chunk_size, options.rank, options.first, options.samples)


if __name__ == "__main__":
    run_command(main)
