"""Train a decoder: parse, build left to right, train. Run by the ``deepspeed`` launcher, by ``torchrun``, or alone."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from lime_dist import load_config
from lime_dist.config.deepspeed import batch_split
from lime_dist.config.load import dump_config
from lime_dist.config.schema import Config
from lime_dist.distributed import agree, check_versions, is_main_process, quiet, start_processes, world_size
from lime_dist.errors import GRACE_SECONDS, LimeError, run_command

T = TypeVar("T")

EXAMPLES = """examples:
  deepspeed --num_gpus 2 pretrain.py --config configs/quickstart.yaml
  deepspeed --hostfile hosts pretrain.py --config C train.steps=1000 parallel.pipeline_stages=8
  python pretrain.py --config configs/quickstart.yaml parallel.pipeline_stages=1     (one process)

A run whose folder (run.directory) holds checkpoints continues from the newest whole one."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file with the sections of a run")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed logs")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    if is_main_process():
        return parser.parse_intermixed_args()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            return parser.parse_intermixed_args()
        except SystemExit as stop:
            if stop.code:
                time.sleep(GRACE_SECONDS)
            raise


def main() -> None:
    arguments = parse()
    check_versions()
    config = load_config(arguments.config, arguments.overrides)
    batch_split(config, world_size())
    start_processes(arguments.verbose, patience=2 * config.pipeline.timeout + 60)
    train(config, arguments.verbose)
    torch.distributed.destroy_process_group()


def train(config: Config, verbose: bool) -> None:
    """Build the parts of a run left to right, train, and print where things are; called on every rank."""
    import torch.distributed as dist

    from lime_dist.checkpoint import store
    from lime_dist.data.dataset import TokenSplit
    from lime_dist.data.loader import TrainBatches, ValidationBatches
    from lime_dist.data.order import SampleOrder
    from lime_dist.monitor.console import Console
    from lime_dist.monitor.metrics import MetricsFile
    from lime_dist.monitor.tensorboard import TensorBoardLog
    from lime_dist.pipeline.placement import describe_placement
    from lime_dist.train import loop
    from lime_dist.train.optim import build_engine
    from lime_dist.train.state import TrainState

    main_process = is_main_process()
    console = Console(main_process)
    width, _ = batch_split(config, dist.get_world_size())
    length, settings = config.data.sequence_length, config.train

    train_split = together(lambda: TokenSplit(config.data.path, "train"))
    together(lambda: check_vocabulary(config, train_split.vocab_size))
    order = SampleOrder(config.data.seed, together(lambda: train_split.num_samples(length)))

    def validation(replica: int) -> ValidationBatches | None:
        if not settings.evaluation_samples:
            return None
        split = TokenSplit(config.data.path, "validation")
        return ValidationBatches(split, length, settings.evaluation_samples, settings.micro_batch_size, replica, width)

    together(lambda: validation(0))
    together(lambda: prepare_directory(Path(config.run.directory)))
    with quiet(verbose):
        engine, optimizer = build_engine(config, verbose)
    replica = engine.grid.get_data_parallel_rank()
    at_an_end = engine.is_first_stage() or engine.is_last_stage()

    evaluation = validation(replica)

    state = TrainState()
    directory = Path(config.run.directory)
    found, passed_over = store.find_newest(directory / "checkpoints")
    for line in passed_over:
        console.say(line)
    if found is not None:
        store.load(found, config, optimizer)
        state = found.state
        console.say(f"resumed from step {state.step} ({found.path})")
    elif passed_over:
        raise LimeError(
            f"no whole checkpoint in {directory / 'checkpoints'}; remove the folder or give another run.directory"
        )

    def open_records() -> tuple[MetricsFile, TensorBoardLog] | tuple[()]:
        if not main_process:
            return ()
        try:
            (directory / "config.yaml").write_text(dump_config(config))
            (directory / "environment.txt").write_text(describe_environment())
            return (
                MetricsFile(directory / "metrics.jsonl", state.step),
                TensorBoardLog(directory / "tensorboard", dump_config(config), state.step),
            )
        except OSError as error:
            raise LimeError(f"run.directory={directory} cannot be written: {error.strerror}") from None

    sinks = together(open_records)
    console.say(
        f"{config.model.architecture}: {config.model.num_hidden_layers} layers in {engine.num_stages} stage(s) × "
        f"{width} replica(s), {config.precision}; steps {state.step} to {settings.steps}, "
        f"{settings.global_batch_size * length:,} tokens a step; {order.num_samples:,} training samples"
    )

    if engine.placement.several:
        console.say(describe_placement(engine.grid.topology(), engine.placement.hosts))

    batches = None
    if at_an_end:
        batches = TrainBatches(
            train_split, order, length, settings.global_batch_size, settings.micro_batch_size, replica, width,
            state.consumed_samples,
        )  # fmt: skip
    run = loop.Run(
        config=config,
        engine=engine,
        optimizer=optimizer,
        train_batches=batches,
        validation_batches=evaluation if at_an_end else None,
        evaluation_micro_batches=len(evaluation) if evaluation is not None else 0,
        console=console,
        sinks=sinks,
    )
    if state.step >= settings.steps:
        console.say(f"nothing left to train: {state.step} steps are done and train.steps={settings.steps}")
    state, validation_loss = loop.train(run, state)
    for sink in sinks:
        sink.close()
    if batches is not None:
        batches.close()

    if validation_loss is not None:
        console.say(
            f"validation loss: {validation_loss:.4f} nats per token "
            f"({math.log(config.model.vocab_size) - validation_loss:.2f} below ln({config.model.vocab_size}))"
        )
    for line in loop.describe_traffic(engine):
        console.say(line)
    console.say(f"tokens seen: {state.consumed_samples * length:,}")
    console.say(f"run folder: {directory}")
    console.say(f"watch it: tensorboard --logdir {directory / 'tensorboard'}")


def together(action: Callable[[], T]) -> T:
    """Run an action on all ranks; a LimeError of any rank is raised on all of them."""
    result: T | None = None
    error: str | None = None
    try:
        result = action()
    except LimeError as problem:
        error = str(problem)
    agree(error)
    return result  # type: ignore[return-value]  # agree raised if there is none


def prepare_directory(directory: Path) -> None:
    """Make the run folder, on rank 0, before anything expensive is built."""
    if not is_main_process():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LimeError(f"run.directory={directory}: {error.strerror}; give a folder that can be written") from None


def check_vocabulary(config: Config, vocab_size: int) -> None:
    if vocab_size > config.model.vocab_size:
        raise LimeError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {vocab_size} pieces of the tokenizer "
            f"that made {config.data.path}; set model.vocab_size={vocab_size} or more"
        )


def describe_environment() -> str:
    names = ("torch", "deepspeed", "numpy", "sentencepiece", "datasets", "tensorboard")
    lines = [
        f"command: {' '.join(sys.argv)}",
        f"host: {platform.node()}, {platform.platform()}, {os.cpu_count()} cores, {world_size()} processes",
        f"python: {platform.python_version()}",
        *(f"{name}: {version(name)}" for name in names),
    ]
    return "\n".join(lines) + "\n"


def leave(status: int) -> NoReturn:
    """End the process without the interpreter's teardown. Everything is closed by now, and a process can abort in that
    teardown (seen in 1 of 16 runs of two processes with torch 2.13 and gloo; the cause was not found)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        run_command(main, speaks=is_main_process())
    except SystemExit as stop:
        leave(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
