"""Train a decoder. Run it with the ``deepspeed`` launcher, with ``torchrun``, or alone as one process."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lime_dist import load_config
from lime_dist.commands import CommandParser
from lime_dist.config.deepspeed import batch_split
from lime_dist.config.schema import Config, SampleTextsConfig
from lime_dist.errors import GRACE_SECONDS, LimeError, PeerLost, run_command
from lime_dist.launchers import is_main_process, world_size

if TYPE_CHECKING:  # at run time these imports wait until `start_processes` has chosen DeepSpeed's accelerator
    from lime_dist.checkpoint.store import Checkpoint
    from lime_dist.data.prompts import Prompts
    from lime_dist.data.run_data import RunData
    from lime_dist.data.state import TrainState
    from lime_dist.data.validation_sets import ValidationSet
    from lime_dist.monitor.console import Console
    from lime_dist.monitor.metrics import MetricsFile
    from lime_dist.monitor.records import Records
    from lime_dist.pipeline.engine import LimeEngine
    from lime_dist.train.loop import Outcome
    from lime_dist.train.profile import Profiler
    from lime_dist.train.run import Run
    from lime_dist.train.stage_optimizer import StageOptimizer
    from lime_dist.train.steps import Steps

EXAMPLES = """examples:
  deepspeed --num_gpus 2 pretrain.py --config configs/quickstart.yaml
  deepspeed --hostfile hosts pretrain.py --config C train.steps=1000 parallel.pipeline_stages=8
  python pretrain.py --config configs/quickstart.yaml parallel.pipeline_stages=1     (one process)
  deepspeed --num_gpus 2 pretrain.py --config configs/quickstart.yaml --profile=20-22

A run whose folder (run.directory) holds checkpoints resumes from the newest whole one."""


def parse() -> argparse.Namespace:
    parser = CommandParser(prog="pretrain.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--config", required=True, help="YAML file with the configuration of the run")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's messages")
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="write traces of some steps, such as 20 or 20-22, and a summary of where their time went, into the run folder",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the configuration"
    )
    if is_main_process():
        return parser.parse_intermixed_args()
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        try:
            return parser.parse_intermixed_args()
        except SystemExit as stop:
            if stop.code:
                time.sleep(GRACE_SECONDS)
            raise


def main() -> None:
    arguments = parse()
    if arguments.profile is not None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints lines of its own
    # Importing torch takes seconds. Here, `run_command` turns a Ctrl-C meanwhile into an exit status without a traceback.
    import torch

    from lime_dist.distributed import check_versions, start_processes
    from lime_dist.monitor.run_lock import wait_for_predecessor
    from lime_dist.train.steps import Steps

    check_versions()
    profiled = None if arguments.profile is None else Steps.parse(arguments.profile)
    config = load_config(arguments.config, arguments.overrides)
    batch_split(config, world_size())
    wait_for_predecessor(Path(config.run.directory))
    start_processes(arguments.verbose, config.pipeline.timeout)
    stopped_by = None
    try:
        stopped_by = train(config, arguments.verbose, profiled)
    except RuntimeError as error:
        from lime_dist.pipeline.engine import is_lost_connection

        if not is_lost_connection(error):
            raise
        rank = torch.distributed.get_rank()
        raise PeerLost(f"rank {rank}, before training: another process of the job is gone; ending the job") from None
    torch.distributed.destroy_process_group()
    if stopped_by == signal.SIGINT.name:
        raise SystemExit(128 + signal.SIGINT)


def train(config: Config, verbose: bool, profiled: Steps | None = None) -> str | None:
    """Run a training from its data to its closing lines, and hold the run folder meanwhile. All ranks must call it.

    Args:
        profiled: the steps to record; None: none.

    Returns:
        What stopped it before its end; None: nothing did.
    """
    import torch

    from lime_dist.data.run_data import open_run_data
    from lime_dist.distributed import quiet, together
    from lime_dist.monitor.console import Console
    from lime_dist.monitor.run_files import open_run_files
    from lime_dist.monitor.run_lock import hold_directory
    from lime_dist.train import loop
    from lime_dist.train.build import build_engine
    from lime_dist.train.profile import Profiler

    console = Console(is_main_process())
    directory = Path(config.run.directory)
    replicas, _ = batch_split(config, torch.distributed.get_world_size())
    with contextlib.ExitStack() as held:
        data = open_run_data(config, replicas)
        for line in notes(config, data):
            console.say(line)
        config = data.settled(config)
        together(lambda: hold_directory(directory, held))
        held.enter_context(console.logging(directory / "console.log"))
        built = settle_checkpointing(config, console)
        with quiet(verbose):
            engine, optimizer = build_engine(built, verbose, data.counted_shares, data.eos)
        if engine.module.compile_obstacle is not None:
            console.say(engine.module.compile_obstacle)
        resumed = resume(config, data, optimizer, console)
        if profiled is not None:
            profiled.check(resumed.state.step, config.train.steps)
        files = together(lambda: open_run_files(directory, config, resumed.state.step))
        if files.metrics is not None and (damaged := files.metrics.damaged):
            console.say(f"{files.metrics.path}: {damaged} unreadable line(s) dropped, left by a crash")
        for line in files.notes:
            console.say(line)
        profiler = None if profiled is None else Profiler(profiled, directory / "profile")
        run = assemble(config, data, engine, optimizer, resumed, files.records, console, profiler)
        announce(run, data, resumed.state)
        try:
            outcome = loop.train(run, resumed.state)
        finally:
            run.close()
        if run.records.problem is not None:
            console.say(run.records.problem)
        if outcome.stopped_by is None:
            report(run, data, outcome, files.metrics)
    return outcome.stopped_by


def settle_checkpointing(config: Config, console: Console) -> Config:
    """The configuration with what each stage computes again, chosen from free memory if it is ``auto``. All ranks must call it."""
    from lime_dist.distributed import free_memory
    from lime_dist.pipeline.checkpointing_choice import describe_checkpointing, with_checkpointing

    if config.parallel.activation_checkpointing != "auto":
        return config
    memory = free_memory()
    chosen = with_checkpointing(config, memory, world_size())
    if (line := describe_checkpointing(config, chosen, memory)) is not None:
        console.say(line)
    return chosen


def notes(config: Config, data: RunData) -> Iterator[str]:
    """What to say of the configuration before anything is built: doubtful settings, and how an open one was settled."""
    from lime_dist.data.doubtful import doubtful_settings
    from lime_dist.data.run_data import describe_evaluation

    for line in doubtful_settings(config):
        yield f"warning: {line}"
    if (settled := describe_evaluation(config, data.evaluation_samples, data.replicas)) is not None:
        yield settled


@dataclass(frozen=True)
class Resumed:
    """Where a run starts.

    Attributes:
        state: of the checkpoint that was loaded; of a new run if there was none.
        restore: loads the newest whole checkpoint, else that of ``run.start_from``, as at the start.
    """

    state: TrainState
    restore: Callable[[], tuple[Checkpoint | None, list[str]]]


def resume(config: Config, data: RunData, optimizer: StageOptimizer, console: Console) -> Resumed:
    """Load the newest whole checkpoint of the run folder, if there is one, else that of ``run.start_from``.

    Raises:
        LimeError: none of its checkpoints is whole, or it belongs to another run.
    """
    from lime_dist.checkpoint.changes import describe_changes
    from lime_dist.checkpoint.restore import restore_newest
    from lime_dist.checkpoint.store import no_whole_checkpoint
    from lime_dist.data.state import TrainState

    checkpoints = checkpoint_folder(config)
    restore = partial(restore_newest, checkpoints, config, data.identity, optimizer, console.say)
    checkpoint, passed_over = restore()
    if checkpoint is not None:
        if checkpoint.weights_only:
            console.say(f"started with the weights of {checkpoint.path}")
        else:
            verb = "started" if checkpoint.of_another_run else "resumed"
            console.say(f"{verb} from step {checkpoint.state.step} ({checkpoint.path})")
            for line in describe_changes(checkpoint, config):
                console.say(line)
        return Resumed(checkpoint.state, restore)
    if passed_over:
        raise LimeError(no_whole_checkpoint(checkpoints))
    return Resumed(TrainState(), restore)


def checkpoint_folder(config: Config) -> Path:
    return Path(config.run.directory) / "checkpoints"


def assemble(
    config: Config,
    data: RunData,
    engine: LimeEngine,
    optimizer: StageOptimizer,
    resumed: Resumed,
    records: Records,
    console: Console,
    profiler: Profiler | None = None,
) -> Run:
    """Make the remaining parts of the run and put all of them together. All ranks must call it."""
    from lime_dist.checkpoint.saver import Saver
    from lime_dist.train.control import Control
    from lime_dist.train.run import EvaluationData, Run
    from lime_dist.train.sample_texts import Sampler

    replica = engine.grid.get_data_parallel_rank()
    reads_data = engine.is_first_stage() or engine.is_last_stage() or data.eos is not None
    gpu = None if engine.device.type == "cpu" else engine.device
    validation = data.validation_batches(replica, gpu)
    sampler = None
    if (samples := config.monitor.samples) is not None:
        sampler = Sampler(engine, open_prompts(config, samples), samples)

    def evaluation_data(one: ValidationSet) -> EvaluationData:
        batches = one.batches(config, replica, data.replicas, gpu)
        return EvaluationData(batches if reads_data else None, len(batches), one.counted_share)

    return Run(
        config=config,
        engine=engine,
        optimizer=optimizer,
        order=data.order,
        batch_sizes=data.batch_sizes,
        train_batches=data.train_batches(replica, resumed.state.consumed_samples, gpu) if reads_data else None,
        validation_batches=validation if reads_data else None,
        validation_sets={each.name: evaluation_data(each) for each in data.validation_sets},
        evaluation_micro_batches=0 if validation is None else len(validation),
        saver=Saver(checkpoint_folder(config), config, data.identity, optimizer, engine.stage_id, replica),
        restore=resumed.restore,
        control=Control(replica, data.replicas, engine.stage_id, engine.num_stages, config.pipeline.timeout),
        console=console,
        records=records,
        sampler=sampler,
        profiler=profiler,
    )


def open_prompts(config: Config, settings: SampleTextsConfig) -> Prompts:
    """Encode the prompts of ``monitor.samples``. Rank 0 reads the tokenizer; all ranks must call it.

    Raises:
        LimeError: the data name no tokenizer, or a prompt is too long.
    """
    from lime_dist.data.prompts import Prompts
    from lime_dist.distributed import from_main_process, together
    from lime_dist.export.run_tokenizer import encode_prompts

    own = together(lambda: encode_prompts(config, settings) if is_main_process() else None)
    tokens, eos, pieces = from_main_process(([], 0, 0) if own is None else (own.tokens, own.eos, own.vocab_size))
    return own or Prompts(settings.prompts, tokens, eos, pieces, str)


def announce(run: Run, data: RunData, state: TrainState) -> None:
    """Print what is about to be trained, on what, and where."""
    from lime_dist.data.blend import BlendOrder
    from lime_dist.data.documents import attention_length
    from lime_dist.model.cost import count_parameters
    from lime_dist.pipeline.boundaries import describe_boundaries
    from lime_dist.pipeline.placement import describe_placement

    config, settings, engine, say = run.config, run.config.train, run.engine, run.console.say
    say(
        f"{config.model.architecture}: {config.model.num_hidden_layers} layers in {engine.num_stages} stage(s) × "
        f"{data.replicas} replica(s), {config.precision}; steps {state.step} to {settings.steps}, "
        f"{settings.global_batch_size * data.sequence_length:,} tokens per step; {data.order.num_samples:,} training samples"
    )
    samples = data.batch_sizes.consumed_after(settings.steps)
    say(
        f"{count_parameters(config.model):,} parameters; {samples / data.order.num_samples:.2f} epochs of training samples"
    )
    if data.eos is not None:
        length = attention_length(config.data, config.model.vocab_size)
        say(
            f"documents do not see each other (data.document_mask): attention reads {(length + 1) / 2:,.0f} tokens on average, "
            f"{(length + 1) / (data.sequence_length + 1):.0%} of those without the mask"
        )
    if data.counts_answers_only and data.counted_shares.training is not None:
        say(f"the loss counts answers only: {data.counted_shares.training:.1%} of all tokens")
    if isinstance(data.order, BlendOrder):
        shares = data.order.shares(data.batch_sizes.consumed_after(settings.steps))
        for entry, share in zip(config.data.blend or [], shares, strict=True):
            say(f"{entry.path}: {share}")
    if engine.placement.several:
        say(describe_placement(engine.grid.topology(), engine.placement.hosts))
    for line in describe_boundaries(config, engine.module.bounds):
        say(line)
    if engine.transfer_ctas is not None:
        say(f"a transfer between stages occupies at most {engine.transfer_ctas} CTAs (pipeline.transfer_ctas)")
    if state.step >= settings.steps:
        say(f"nothing to train: {state.step} steps are done and train.steps={settings.steps}")


def report(run: Run, data: RunData, outcome: Outcome, metrics: MetricsFile | None) -> None:
    """Print how the run ended and where its results are. All ranks must call it.

    Args:
        metrics: on rank 0, the file with the validation losses of all starts.
    """
    from lime_dist.train.measurements import describe_exchange, describe_transfers

    directory, vocab_size, say = Path(run.config.run.directory), run.config.model.vocab_size, run.console.say
    run.console.time_split(outcome.time_split)
    if (loss := outcome.validation_loss) is not None:
        say(
            f"validation loss: {loss:.4f} nats per {'answer token' if data.counts_answers_only else 'token'} "
            f"({math.log(vocab_size) - loss:.2f} below ln({vocab_size}))"
        )
    if metrics is not None and (best := metrics.best_validation()) is not None:
        say(f"best validation loss {best[0]:.4f} at step {best[1]}")
    for line in (*describe_transfers(run.engine), *describe_exchange(run)):
        say(line)
    say(f"tokens seen: {outcome.state.consumed_samples * data.sequence_length:,}")
    say(f"run folder: {directory}")
    say(f"view it with: tensorboard --logdir {directory / 'tensorboard'}")


def leave(status: int) -> NoReturn:
    """End the process without the interpreter's teardown, in which a process can abort.

    Everything is closed by now. (An abort was seen in 1 of 16 runs of two processes with torch 2.13 and gloo; its cause is
    not known.)
    """
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
