"""DeepSpeed's PipelineEngine with those parts replaced that correct gradients need, whatever the schedule.

`LimeEngine` runs the stock schedule with its blocking transfers (``pipeline.engine: stock``); `overlap.py` has the other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils.timer import NoopTimer
from torch import Tensor

from lime_dist.config.deepspeed import deepspeed_config
from lime_dist.config.schema import Config
from lime_dist.errors import PeerLost
from lime_dist.model.decoder import EMBEDDING
from lime_dist.pipeline.clock import INSTRUCTIONS, VALIDATION, WAITING, Clock
from lime_dist.pipeline.module import LimePipelineModule
from lime_dist.pipeline.placement import gather_placement
from lime_dist.pipeline.transfer import Traffic
from lime_dist.pipeline.watchdog import Watchdog

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ProcessGroups:
    """The ranks that a stage's optimizer talks to.

    Attributes:
        replicas: the ranks that hold this stage (data parallel).
        pipeline: the ranks of one replica, over all stages.
        tied: by exported name, the ranks of this replica that share the weight.
        tied_copies: exported names whose weight another stage counts.
    """

    replicas: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    tied: Mapping[str, dist.ProcessGroup]
    tied_copies: frozenset[str]


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective or a transfer failed because another process is gone (gloo raises a plain RuntimeError)."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


class GradientOptimizer(Protocol):
    """What the engine needs of an optimizer; `train/optim.py` has the one there is."""

    def reduce_gradients(self, loss: Tensor | None) -> None: ...

    def step(self) -> bool: ...


class LimeEngine(PipelineEngine):
    """Runs the stock schedule; gradients, norm, clipping and the update belong to ``optimizer``, set before the first step.

    Attributes:
        counted_share: of the labels in training, those that the loss counts, where it does not count all; set by the entry.
        validation_share: the same of the validation samples.
    """

    optimizer: GradientOptimizer
    total_loss: Tensor | None
    counted_share: float | None = None
    validation_share: float | None = None

    def __init__(self, module: LimePipelineModule, config: Config) -> None:
        world_size = dist.get_world_size()
        settings = deepspeed_config(config, world_size)
        mpu = module.mpu()
        super().__init__(args=None, model=module, config=settings, config_class=DeepSpeedConfig(settings, mpu), mpu=mpu)
        self.lime_config = config
        self.timers = NoopTimer()  # the stock one keeps two CUDA events a step for ever
        self.placement = gather_placement()
        self.watchdog = Watchdog(config.pipeline.timeout)
        self.clock = Clock(self.device)
        self._shape: tuple[int, int] | None = None

    def _broadcast_model(self) -> None:
        """Nothing to do: initial values are a function of seed and name. (Stock: fails on a parameter without dimensions.)"""

    def _tied_communicators(self) -> dict[str, dict[str, Any]]:
        """By exported name: DeepSpeed's group, ranks and module of a weight that lives on two stages."""
        return {f"{EMBEDDING}.weight": comm for comm in self.module.tied_comms.values() if len(set(comm["ranks"])) > 1}

    def process_groups(self) -> ProcessGroups:
        """The groups of this rank's stage."""
        tied = self._tied_communicators()
        return ProcessGroups(
            replicas=self.mpu.get_data_parallel_group(),
            pipeline=self.mpu.get_pipe_parallel_group(),
            tied={name: comm["group"] for name, comm in tied.items()},
            tied_copies=frozenset(name for name, comm in tied.items() if self.global_rank != min(comm["ranks"])),
        )

    def train_step(self, batches: Batches | None, micro_batches: int | None = None) -> float:
        """One step; returns the mean loss over the global batch (nats per token), on every rank.

        Args:
            micro_batches: of every replica; None: as the configured global batch has.

        Raises:
            PeerLost: another process of the job is gone; the line says which, and when it was missed.
        """
        self._use_shape(self.lime_config.train.micro_batch_size)
        self.micro_batches = micro_batches or self.gradient_accumulation_steps()
        with self.watching(f"the mean loss of step {self.global_steps + 1}"):
            loss = float(self.train_batch(batches))
        self.clock.totals()  # the loss has been waited for: nothing is queued, and the clock's marks are let go
        return loss

    def evaluate(self, batches: Batches | None, micro_batches: int, micro_batch_size: int | None = None) -> float:
        """Mean loss over ``micro_batches`` micro-batches of every replica, on every rank; changes nothing.

        Args:
            micro_batch_size: samples of one, on all ranks alike; None: as in training.
        """
        self._use_shape(micro_batch_size or self.lime_config.train.micro_batch_size)
        with (
            self.watching(f"the mean loss of the evaluation after step {self.global_steps}"),
            self.clock.measuring(VALIDATION),
        ):
            loss = float(self.eval_batch(batches, num_micro_batches=micro_batches))
        self.pipe_buffers["outputs"] = [None] * self.num_pipe_buffers  # the last logits
        return loss

    def micro_batch_losses(self) -> list[float]:
        """Of the newest step, on the last stage; empty on the others."""
        return [loss.item() for loss in self.fwd_outputs] if self.is_last_stage() else []

    def traffic(self) -> dict[str, Traffic]:
        """What this stage has sent and received, by direction; the stock engine does not count."""
        return {}

    def _use_shape(self, micro_batch_size: int) -> None:
        """Whatever stages exchange from now on is of micro-batches of this size. (The stock engine agrees on a shape once:
        make it agree again when it changes.)"""
        shape = (micro_batch_size, self.lime_config.data.sequence_length)
        if self._shape != shape:
            self.reset_activation_shape()
            self._shape = shape

    # -- where it is, should it not get on ----------------------------------------------------------------------------

    @contextmanager
    def watching(self, work: str, ranks: Sequence[int] | None = None) -> Iterator[None]:
        """Watch a piece of work on this stage. Too long: the watchdog ends the process. A connection that breaks: PeerLost.

        On a GPU most work is queued, not waited for: what is named is where the host waited.

        Args:
            ranks: whom the work is done with, unless ``work`` says so; None: all.
        """
        company = self.placement.company(range(len(self.placement.hosts)) if ranks is None else ranks, self.global_rank)
        place = f"stage {self.stage_id} ({self.placement.name(self.global_rank)}), {work}{company}"
        try:
            with self.watchdog.watching(place):
                yield
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            reason = self.placement.explain(str(error).splitlines()[0])
            raise PeerLost(f"{place}: {reason}; ending the job") from error

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        """The stock loop, with every instruction watched and its time measured."""
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        self.fwd_outputs: list[Tensor] = []
        counts: dict[str, int] = {}
        for instructions in pipe_schedule:
            for instruction in instructions:
                name = type(instruction).__name__
                counts[name] = counts.get(name, -1) + 1
                with (
                    self.watching(self._describe(instruction, counts[name]), self._partners(instruction)),
                    self.clock.measuring(INSTRUCTIONS[name]),
                ):
                    MethodType(self._INSTRUCTION_MAP[type(instruction)], self)(**instruction.kwargs)

    def _describe(self, instruction: schedule.PipeInstruction, count: int) -> str:
        """An instruction, its micro-batch and its peer; the ``count``-th of its kind is about micro-batch ``count``."""
        name, step = type(instruction).__name__, f"step {self.global_steps + 1}"
        if not isinstance(instruction, schedule.BufferOpInstruction):
            return f"{name} of {step}"
        peer = {"RecvActivation": -1, "SendGrad": -1, "SendActivation": 1, "RecvGrad": 1}.get(name)
        if peer is None:
            return f"{name} of micro-batch {count}, {step}"
        stage = self.stage_id + peer
        direction = "from" if name.startswith("Recv") else "to"
        rank = self.placement.name(self._rank_of(stage))
        return f"{name} of micro-batch {count} {direction} stage {stage} ({rank}), {step}"

    def _partners(self, instruction: schedule.PipeInstruction) -> Sequence[int] | None:
        """Whom an instruction is performed with, beside the peer that `_describe` names; None: all ranks."""
        if isinstance(instruction, schedule.BufferOpInstruction):
            return ()
        if not isinstance(instruction, schedule.ReduceGrads):
            return None
        sharing = (rank for comm in self._tied_communicators().values() for rank in comm["ranks"])
        return [*self.grid.dp_group, *sharing]

    def _rank_of(self, stage: int) -> int:
        """Global rank of a stage of this replica."""
        return int(self.grid.stage_to_global(stage))

    # -- instructions -------------------------------------------------------------------------------------------------

    def _exec_forward_pass(self, buffer_id: int) -> None:
        """Stock: also clones the payload, and hooks the output so that backward outside the engine is refused."""
        outputs = self.module(self.pipe_buffers["inputs"][buffer_id])
        self.pipe_buffers["outputs"][buffer_id] = outputs
        if self.is_last_stage():
            self.loss = self._add_loss(outputs, self.pipe_buffers["labels"][buffer_id])

    def _add_loss(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """The loss of a micro-batch, on the last stage; also added up for the step's mean."""
        share = self.counted_share if torch.is_grad_enabled() else self.validation_share
        loss: Tensor = self.module.loss_fn(logits_BTV, labels_BT, share)
        self.fwd_outputs.append(loss.detach())
        self.total_loss = loss.detach().clone() if self.total_loss is None else self.total_loss + loss.detach()
        return loss

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """One backward per stage and micro-batch; the mean over micro-batches is taken at the loss."""
        if self.is_last_stage():
            (self.loss / self.micro_batches).backward()
            self.loss = self.loss.detach()
        else:
            self.pipe_buffers["outputs"][buffer_id].backward(self.grad_layer)
        self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_reduce_tied_grads(self) -> None:
        """Comes before ReduceGrads in the stock schedule; the optimizer adds tied gradients up after it."""

    def _exec_reduce_grads(self) -> None:
        self.optimizer.reduce_gradients(self.total_loss)

    def _exec_optimizer_step(self, lr_kwargs: object = None) -> None:
        self.optimizer.step()
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def _aggregate_total_loss(self) -> Tensor:
        """The global batch's mean loss on every rank."""
        loss = torch.zeros((), device=self.device)
        with self.clock.measuring(WAITING):
            if self.is_last_stage():
                assert self.total_loss is not None
                loss = self.total_loss / self.micro_batches
                if self.is_data_parallel:
                    dist.all_reduce(loss, group=self.mpu.get_data_parallel_group())
                    loss /= self.dp_world_size
            return self._bcast_pipe_scalar(loss)

    def _bcast_pipe_scalar(self, data: Tensor, src_rank: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Stock: always float32; here the precision that losses are computed in, at least float32."""
        exact = torch.promote_types(next(self.module.parameters()).dtype, torch.float32)
        return super()._bcast_pipe_scalar(data, src_rank, exact)

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.OptimizerStep: _exec_optimizer_step,
    }
