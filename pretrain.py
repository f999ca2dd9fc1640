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
from lime_dist.data.files import lock_folder, write_atomic
from lime_dist.distributed import agree, check_versions, is_main_process, quiet, start_processes, world_size
from lime_dist.errors import GRACE_SECONDS, LimeError, run_command

T = TypeVar("T")

LOCK_PATIENCE = 60.0
"""Seconds to wait for another run that writes into the same folder."""

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
    wait_for_predecessor(Path(config.run.directory))
    start_processes(arguments.verbose, patience=2 * config.pipeline.timeout + 60)
    train(config, arguments.verbose)
    torch.distributed.destroy_process_group()


def train(config: Config, verbose: bool) -> None:
    """Train, and print where things are; called on every rank. Rank 0 holds the run folder meanwhile."""
    with contextlib.ExitStack() as held:
        build_and_train(config, verbose, held)


def build_and_train(config: Config, verbose: bool, held: contextlib.ExitStack) -> None:
    """Build the parts of a run left to right, and train."""
    import torch.distributed as dist

    from lime_dist.checkpoint import store
    from lime_dist.checkpoint.saver import Saver
    from lime_dist.data.answers import MEASURED_SAMPLES, find_answers
    from lime_dist.data.blend import BlendOrder, open_training, open_validation
    from lime_dist.data.loader import TrainBatches, ValidationBatches
    from lime_dist.data.ramp import BatchSizes
    from lime_dist.data.state import TrainState
    from lime_dist.monitor.console import Console
    from lime_dist.monitor.metrics import MetricsFile
    from lime_dist.monitor.records import Records
    from lime_dist.monitor.tensorboard import TensorBoardLog
    from lime_dist.pipeline.placement import describe_placement
    from lime_dist.train import loop
    from lime_dist.train.control import Control
    from lime_dist.train.optim import build_engine
    from lime_dist.train.run import Run

    main_process = is_main_process()
    console = Console(main_process)
    width, _ = batch_split(config, dist.get_world_size())
    length, settings = config.data.sequence_length, config.train

    train_split, order = together(lambda: open_training(config.data, config.model.vocab_size))
    together(lambda: check_vocabulary(config, train_split.vocab_size, str(train_split.path)))

    answers = together(lambda: find_answers(train_split, config.data.answer_token))

    def validation(replica: int) -> ValidationBatches | None:
        if not settings.evaluation_samples:
            return None
        split = open_validation(config.data, config.model.vocab_size)
        return ValidationBatches(
            split, length, settings.evaluation_samples, settings.micro_batch_size, replica, width, answers
        )

    def counted_shares() -> tuple[float | None, float | None]:
        """Of the labels in training and in validation, those that the loss counts; None: all, or no validation."""
        if answers is None:
            return None, None
        training = answers.share(train_split, length, order.num_samples, MEASURED_SAMPLES)
        if not settings.evaluation_samples:
            return training, None
        split = open_validation(config.data, config.model.vocab_size)
        return training, answers.share(split, length, settings.evaluation_samples)

    together(lambda: validation(0))
    training_share, validation_share = together(counted_shares)
    together(lambda: prepare_directory(Path(config.run.directory), held))
    with quiet(verbose):
        engine, optimizer = build_engine(config, verbose)
    engine.counted_share, engine.validation_share = training_share, validation_share
    replica = engine.grid.get_data_parallel_rank()
    at_an_end = engine.is_first_stage() or engine.is_last_stage()

    evaluation = validation(replica)

    state = TrainState()
    directory = Path(config.run.directory)
    checkpoints = directory / "checkpoints"
    found, passed_over = store.find_newest(checkpoints)
    for line in passed_over:
        console.say(line)
    if found is not None:
        store.load(found, config, order.num_samples, optimizer)
        state = found.state
        console.say(f"resumed from step {state.step} ({found.path})")
    elif passed_over:
        raise LimeError(f"no whole checkpoint in {checkpoints}; remove the folder or give another run.directory")

    def open_records() -> tuple[MetricsFile, TensorBoardLog] | tuple[()]:
        if not main_process:
            return ()
        try:
            write_atomic(directory / "config.yaml", dump_config(config).encode())
            write_atomic(directory / "environment.txt", describe_environment().encode())
            return (
                MetricsFile(directory / "metrics.jsonl", state.step),
                TensorBoardLog(directory / "tensorboard", dump_config(config), state.step),
            )
        except OSError as error:
            raise LimeError(f"run.directory={directory} cannot be written: {error.strerror}") from None

    batch_sizes = BatchSizes(settings.global_batch_size, settings.batch_ramp)
    sinks = together(open_records)
    records = Records(sinks)
    console.say(
        f"{config.model.architecture}: {config.model.num_hidden_layers} layers in {engine.num_stages} stage(s) × "
        f"{width} replica(s), {config.precision}; steps {state.step} to {settings.steps}, "
        f"{settings.global_batch_size * length:,} tokens a step; {order.num_samples:,} training samples"
    )
    if training_share is not None:
        console.say(f"the loss counts answers alone: {training_share:.1%} of all tokens")
    if isinstance(order, BlendOrder):
        for entry, share in zip(
            config.data.blend or [], order.shares(batch_sizes.consumed_after(settings.steps)), strict=True
        ):
            console.say(f"{entry.path}: {share}")

    if engine.placement.several:
        console.say(describe_placement(engine.grid.topology(), engine.placement.hosts))

    batches = None
    if at_an_end:
        batches = TrainBatches(
            train_split, order, length, batch_sizes, settings.micro_batch_size, replica, width,
            state.consumed_samples, answers,
        )  # fmt: skip
    run = Run(
        config=config,
        engine=engine,
        optimizer=optimizer,
        order=order,
        batch_sizes=batch_sizes,
        train_batches=batches,
        validation_batches=evaluation if at_an_end else None,
        evaluation_micro_batches=len(evaluation) if evaluation is not None else 0,
        saver=Saver(checkpoints, config, order.num_samples, optimizer, engine.stage_id, replica),
        control=Control(replica, width, engine.is_first_stage(), engine.is_last_stage(), config.pipeline.timeout),
        console=console,
        records=records,
    )
    if state.step >= settings.steps:
        console.say(f"nothing left to train: {state.step} steps are done and train.steps={settings.steps}")
    try:
        outcome = loop.train(run, state)
    finally:
        records.close()
        if batches is not None:
            batches.close()
    if records.problem is not None:
        console.say(records.problem)
    if outcome.stopped is not None:
        return
    state, validation_loss = outcome.state, outcome.validation_loss

    console.time_split(outcome.split)
    if validation_loss is not None:
        console.say(
            f"validation loss: {validation_loss:.4f} nats per {'token' if answers is None else 'answer token'} "
            f"({math.log(config.model.vocab_size) - validation_loss:.2f} below ln({config.model.vocab_size}))"
        )
    if sinks and (best := sinks[0].best_validation()) is not None:
        console.say(f"best validation loss {best[0]:.4f} at step {best[1]}")
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


def wait_for_predecessor(directory: Path) -> None:
    """Let the processes of an earlier start end, on rank 0: they save and stop when their launcher is gone, and hold its port."""
    if not is_main_process() or not (directory / ".lock").exists():
        return
    try:
        with lock_folder(directory):
            return
    except LimeError:
        print(f"another run is still writing into {directory}; waiting for its end", flush=True)
    with lock_folder(directory, LOCK_PATIENCE):
        pass


def prepare_directory(directory: Path, held: contextlib.ExitStack) -> None:
    """Make the run folder and hold it, on rank 0, before anything expensive is built."""
    if not is_main_process():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LimeError(f"run.directory={directory}: {error.strerror}; give a folder that can be written") from None
    held.enter_context(lock_folder(directory, LOCK_PATIENCE))


def check_vocabulary(config: Config, vocab_size: int | None, path: str) -> None:
    if vocab_size is not None and vocab_size > config.model.vocab_size:
        raise LimeError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {vocab_size} pieces of the tokenizer "
            f"that made {path}; set model.vocab_size={vocab_size} or more"
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
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe, a log on a full disk
            stream.flush()
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
