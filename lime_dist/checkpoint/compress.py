"""Turn a trained `full` K/V model into a `chunked` one by the best block low-rank fit of its routers.

What the layers after a chunk weigh the chunk's slots with is a matrix B, rows (layer, head), columns (layer of the chunk,
head). A chunk with a summary of r rows allows B ≈ Q·A with A [r·G, c·G]; the best such product is B's singular value
decomposition, cut after r·G (Eckart and Young). A takes the leading right singular vectors, and each later layer's Q its rows
of B·Aᵀ. The first j slots are read by themselves (P), so they are exact and the fit leaves them out. What a layer reads within
its own chunk (R) stays as it is. Rows of A beyond B's rank complete it to an orthonormal set: they can be trained.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lime_dist.checkpoint.reading import Weights, load_decoder, read_weights
from lime_dist.checkpoint.writing import write_checkpoint
from lime_dist.config.load import dump_config, make_config
from lime_dist.config.schema import Config
from lime_dist.data.answers import find_answers
from lime_dist.data.blend import open_training, open_validation
from lime_dist.data.files import write_atomic
from lime_dist.errors import LimeError, run_command
from lime_dist.export.comparison import mean_loss, validation_batches
from lime_dist.model.init import CHUNKS
from lime_dist.model.layout import Chunk, summarised_chunks
from lime_dist.model.policies import make_policy

EXAMPLE = """example:
  python -m lime_dist.checkpoint.compress --checkpoint runs/full --policy chunked --chunk-size 8 --rank 2 --first 2 \\
    --output runs/chunked
  deepspeed --num_gpus 2 pretrain.py --config runs/chunked/config.yaml train.steps=1000"""


@dataclass(frozen=True)
class Fit:
    """How well the summary of a chunk stands for its slots: squared norms of what was to be fitted, and of what is left."""

    chunk: int
    size: float
    left: float


def chunked_config(config: Config, chunk_size: int, rank: int, first: int, output: Path) -> Config:
    """The configuration of the compressed run.

    Raises:
        LimeError: the model is no `full` K/V one, or the numbers do not fit it.
    """
    model = config.model
    if model.architecture != "lime" or model.lime.routes != "kv" or model.lime.history.policy != "full":
        raise LimeError(
            f"model.architecture={model.architecture}, model.lime.routes={model.lime.routes}, "
            f"model.lime.history.policy={model.lime.history.policy}: only lime, kv, full can be compressed"
        )
    values = config.model_dump(mode="json")
    history = {"policy": "chunked", "chunk_size": chunk_size, "rank": rank, "first": first}
    values["model"]["lime"]["history"] = history
    values["run"]["directory"] = str(output)
    compressed = make_config(values, "the command line")
    if not summarised_chunks(make_policy(compressed.model.lime), model.num_hidden_layers):
        raise LimeError(
            f"--chunk-size {chunk_size}: no layer comes after a whole chunk, model.num_hidden_layers={model.num_hidden_layers}; "
            "give a smaller one"
        )
    return compressed


def compress_weights(config: Config, weights: Weights) -> tuple[Weights, list[Fit]]:
    """The weights of the chunked model that is nearest to a full one.

    Args:
        config: of the chunked model.
        weights: of the full model.
    """
    model, history = config.model, config.model.lime.history
    heads, layers = model.key_value_heads, model.num_hidden_layers
    chunk_size, first = history.chunk_size or 1, history.first or 0
    routers = {layer: weights[_router(layer)].double() for layer in range(1, layers)}
    found = dict(weights)
    summaries: dict[int, list[Tensor]] = {layer: [] for layer in routers}
    fits = []
    for chunk in summarised_chunks(make_policy(model.lime), layers):
        later = range(chunk.layers.stop, layers)
        block = torch.cat([_columns(routers[layer], chunk, heads) for layer in later])
        if chunk.index == 0:
            block[:, : first * heads] = 0
        _, _, right = torch.linalg.svd(block, full_matrices=True)
        basis = right[: chunk.num_rows * heads]
        found[f"{CHUNKS}{chunk.index}.weight"] = basis.float()
        fitted = block @ basis.t()
        for layer, rows in zip(later, fitted.split(heads), strict=True):
            summaries[layer].append(rows)
        left = block - fitted @ basis
        fits.append(Fit(chunk.index, block.pow(2).sum().item(), left.pow(2).sum().item()))
    for layer, parts in summaries.items():
        if parts:
            begin = layer - layer % chunk_size
            found[_router(layer, "summary_")] = torch.cat(parts, 1).float()
            found[_router(layer)] = routers[layer][:, begin * heads :].float()
            if first:
                found[_router(layer, "first_")] = routers[layer][:, : first * heads].float()
    return found, fits


def _router(layer: int, kind: str = "") -> str:
    return f"model.layers.{layer}.self_attn.router.{kind}weight"


def _columns(router: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """What a full router weighs a chunk's slots with."""
    return router[:, chunk.layers.start * heads : chunk.layers.stop * heads].clone()


def compress(
    checkpoint: Path, output: Path, chunk_size: int, rank: int, first: int, samples: int | None
) -> tuple[float, float]:
    """Write a run folder that training goes on from; returns the validation loss before and after.

    The new run begins at step 0 with moments of zero, and at the sample where the old one stopped.

    Raises:
        LimeError: something given is wrong, or ``output`` holds checkpoints.
    """
    config, state, weights = read_weights(checkpoint)
    compressed = chunked_config(config, chunk_size, rank, first, output)
    length = config.data.sequence_length
    _, order = open_training(config.data, config.model.vocab_size)
    validation = open_validation(config.data, config.model.vocab_size)
    samples = samples or min(config.train.evaluation_samples, validation.num_samples(length)) or 1
    answers = find_answers(validation, config.data.answer_token)
    share = answers.share(validation, length, samples) if answers is not None else None
    found, fits = compress_weights(compressed, weights)
    before, after = (
        mean_loss(
            load_decoder(one.model, values),
            validation_batches(validation, length, samples, answers),
            counted_share=share,
        )
        for one, values in ((config, weights), (compressed, found))
    )
    write_checkpoint(output / "checkpoints", compressed, order.num_samples, found, state.consumed_samples)
    write_atomic(output / "config.yaml", dump_config(compressed).encode())
    for fit in fits:
        print(
            f"chunk {fit.chunk}: {fit.left / fit.size if fit.size else 0:.2%} of the squared weights that its summary stands for are lost"
        )
    size, left = sum(fit.size for fit in fits), sum(fit.left for fit in fits)
    print(f"routers: {left / size if size else 0:.2%} of the squared weights that summaries stand for are lost")
    print(f"loss {before:.4f} before, {after:.4f} after ({samples} validation samples of {length} tokens)")
    print(f"written: {output}; train on with pretrain.py --config {output / 'config.yaml'} train.steps=…")
    return before, after


def main(arguments: list[str] | None = None) -> None:
    """``python -m lime_dist.checkpoint.compress``."""
    parser = argparse.ArgumentParser(
        prog="python -m lime_dist.checkpoint.compress",
        description="Give a trained model with a full history a bounded one, by the best block low-rank fit of its routers.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="run folder, its checkpoints, or one global_stepN"
    )
    parser.add_argument("--output", required=True, type=Path, help="run folder to make")
    parser.add_argument("--policy", required=True, choices=("chunked",), help="of the result")
    parser.add_argument("--chunk-size", required=True, type=int, help="layers of a chunk")
    parser.add_argument("--rank", required=True, type=int, help="rows of a chunk's summary, at most the chunk size")
    parser.add_argument("--first", type=int, default=0, help="first layers that are read by themselves (default 0)")
    parser.add_argument("--samples", type=int, help="validation samples of the two losses (default: as the run)")
    options = parser.parse_args(arguments)
    if options.samples is not None and options.samples < 1:
        raise LimeError(f"--samples {options.samples}: must be at least 1")
    compress(options.checkpoint, options.output, options.chunk_size, options.rank, options.first, options.samples)


if __name__ == "__main__":
    run_command(main)
