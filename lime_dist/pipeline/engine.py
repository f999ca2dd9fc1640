"""DeepSpeed's PipelineEngine with the parts replaced that correct gradients need under any schedule.

`LimeEngine` runs DeepSpeed's own schedule with its blocking transfers (``pipeline.engine: stock``); the engine in `overlap.py`
derives from it. `lime_dist/contract.py` lists what both need of DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils.timer import NoopTimer
from torch import Tensor
from torch.profiler import record_function

from lime_dist.config.deepspeed import deepspeed_config
from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Config
from lime_dist.data.answers import ALL_COUNTED, CountedShares
from lime_dist.errors import PeerLost
from lime_dist.model.history import LayerHistory
from lime_dist.model.mean_weights import MeanWeights
from lime_dist.model.weight_gradients import WeightGradients
from lime_dist.pipeline.clock import INSTRUCTIONS, VALIDATION, WAITING, Clock
from lime_dist.pipeline.document_stream import Batches, DocumentStream
from lime_dist.pipeline.module import LimePipelineModule
from lime_dist.pipeline.placement import gather_placement
from lime_dist.pipeline.process_groups import tied_communicators
from lime_dist.pipeline.shared_weights import shared_parameters
from lime_dist.pipeline.transfer import TransferStats
from lime_dist.pipeline.warm_up import needs_warm_up, run_on_zeros
from lime_dist.pipeline.watchdog import Watchdog


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective or a transfer failed because another process is gone. (gloo raises a plain RuntimeError.)"""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


class GradientOptimizer(Protocol):
    """What the engine needs of an optimizer."""

    def warm_up(self, loss: Tensor | None) -> None: ...

    def gradient_of(self, weight: Tensor) -> Tensor:
        """The accumulated gradient of a parameter, in its shape; it may be added to."""

    def begin_last_pass(self) -> None:
        """Take note that the last backward pass of a step begins."""

    def gradient_is_final(self, weight: Tensor) -> None:
        """Take note that nothing more is added to the gradient of a parameter in this step, once its last backward pass has begun."""

    def reduce_gradients(self, loss: Tensor | None) -> None: ...

    def step(self) -> Tensor:
        """Queue the update; returns gradient norms [2], of the model and of the stage."""

    def settle(self, norms: Sequence[float]) -> bool:
        """Take note of a step whose ``norms`` have been read; returns whether it updated the parameters."""


class LimeEngine(PipelineEngine):
    """Runs the stock schedule. ``optimizer`` owns gradients, norm, clipping and the update.

    Args:
        clock: times the instructions; the optimizer may use it as well.
        counted_shares: fractions of the labels that count in the loss.
        eos: the token that ends every document, beyond which attention does not reach; None: it reaches across documents.

    Attributes:
        names_instructions: whether traces of torch's profiler name the instructions.
    """

    optimizer: GradientOptimizer
    total_loss: Tensor | None
    fwd_outputs: list[Tensor]
    _norms: Tensor

    def __init__(
        self,
        module: LimePipelineModule,
        config: Config,
        optimizer: GradientOptimizer,
        clock: Clock,
        counted_shares: CountedShares = ALL_COUNTED,
        eos: int | None = None,
    ) -> None:
        world_size = dist.get_world_size()
        settings = deepspeed_config(config, world_size)
        mpu = module.mpu()
        super().__init__(args=None, model=module, config=settings, config_class=DeepSpeedConfig(settings, mpu), mpu=mpu)
        self.lime_config = config
        self.optimizer, self.clock = optimizer, clock
        self._counted_shares, self._evaluated_share = counted_shares, counted_shares.validation
        self._eos = eos
        self._documents: DocumentStream | None = None
        self.timers = NoopTimer()  # the stock timers keep two CUDA events per step and never free them
        self.placement = gather_placement()
        self.watchdog = Watchdog(config.pipeline.timeout, self.device)
        self._shape: tuple[int, int] | None = None
        self.fwd_outputs = []
        self._micro_batch_losses: list[float] = []
        self.names_instructions = False
        self._read_output: Callable[[Tensor], None] | None = None

    def start_after(self, step: int) -> None:
        """Number the next training step ``step + 1``."""
        self.global_steps = step

    def _broadcast_model(self) -> None:
        """Nothing to do: initial values are a function of seed and name. (The stock method fails on scalar parameters.)"""

    @property
    def needs_warm_up(self) -> bool:
        """Whether this stage has something to load or to compile before its first transfer (`lime_dist.pipeline.warm_up`)."""
        return needs_warm_up(self.num_stages, self.device, self.lime_config.train.compile is True)

    @property
    def masks_documents(self) -> bool:
        """Whether attention stops where documents begin."""
        return self._eos is not None

    def warm_up(self) -> None:
        """Run a micro-batch of zeros through this stage, in training and in evaluation, and an update. No state changes.

        All ranks must call it together, between steps.
        """
        for is_training, work in ((True, "a training step"), (False, "an evaluation")):
            with self.watching(f"warming up for {work}", ranks=()):
                run_on_zeros(self, is_training)
        with self.watching("warming up for the update"):
            self.optimizer.warm_up(torch.zeros((), device=self.device) if self.is_last_stage() else None)

    def payload_of_zeros(self, batch: int, length: int, part: int = 0) -> tuple[Tensor, LayerHistory | None]:
        """A payload as the forward pass of a part takes it, and the history that it is part of, if it is."""
        received, history = self.module.landing(batch, length, part)
        return self.module.arrived(received.zero_(), history, batch, length, part)

    def deferred_gradients(self) -> WeightGradients | None:
        """Where the weight gradients of a micro-batch go in training; None: backward computes them at once."""
        return WeightGradients() if SCHEDULES[self.lime_config.pipeline.schedule].splits_backward else None

    def train_step(self, batches: Batches | None, micro_batches: int | None = None) -> float:
        """Run one training step and return the mean loss over the global batch (nats per token), on every rank.

        Args:
            micro_batches: micro-batches per replica; None: as many as the configured global batch has.

        Raises:
            PeerLost: another process of the job is gone; the message names it and the operation that failed.
        """
        self._use_shape(self.lime_config.train.micro_batch_size)
        self.micro_batches = micro_batches or self.gradient_accumulation_steps()
        with self.watching(f"the mean loss of step {self.global_steps + 1}"):
            mean = self.train_batch(self._streamed(batches))
            wanted = [mean, self._norms, *([torch.stack(self.fwd_outputs)] if self.fwd_outputs else [])]
            # The step's only wait for the device, after all its work has been queued.
            values: list[float] = torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in wanted]).tolist()
        loss, norms, self._micro_batch_losses = values[0], values[1:3], values[3:]
        self.optimizer.settle(norms)
        self.clock.totals()  # frees the events of the clock, which the device has passed
        return loss

    def evaluate(
        self,
        batches: Batches | None,
        micro_batches: int,
        micro_batch_size: int | None = None,
        counted_share: float | None = None,
    ) -> float:
        """Return the mean loss over ``micro_batches`` micro-batches of every replica, on every rank. No parameter changes.

        Args:
            micro_batch_size: samples per micro-batch, the same on all ranks; None: as in training.
            counted_share: fraction of the labels that count in the loss; None: as in the validation split.
        """
        self._evaluated_share = self._counted_shares.validation if counted_share is None else counted_share
        self._use_shape(micro_batch_size or self.lime_config.train.micro_batch_size)
        with (
            self.watching(f"the mean loss of the evaluation after step {self.global_steps}"),
            self.clock.measuring(VALIDATION),
        ):
            self.module.eval()
            self.micro_batches, self.data_iterator, self.total_loss = micro_batches, self._streamed(batches), None
            with torch.no_grad():
                self._exec_schedule(self._inference_schedule(micro_batches))
                loss = float(self._aggregate_total_loss())
        self.pipe_buffers["outputs"] = [None] * self.num_pipe_buffers  # free the last ones
        return loss

    def read_outputs(self, batches: Batches | None, micro_batches: int, read: Callable[[Tensor], None]) -> None:
        """Run forward passes without a loss. All ranks of a replica must call it; other replicas need not.

        Args:
            read: called on the last stage for each micro-batch in turn, with the hidden states [B, T, D] after the last norm.
        """
        self._use_shape(self.lime_config.train.micro_batch_size)
        self.module.eval()
        self.micro_batches, self.data_iterator, self._read_output = micro_batches, self._streamed(batches), read
        try:
            with torch.no_grad(), self.clock.measuring(VALIDATION):
                self._exec_schedule(self._inference_schedule(micro_batches))
        finally:
            self._read_output = None
        self.pipe_buffers["outputs"] = [None] * self.num_pipe_buffers

    def read_mean_weights(self, batches: Batches | None, micro_batches: int) -> MeanWeights:
        """The weights with which the layers of this stage read, where they depend on the token, in forward passes over ``micro_batches``
        micro-batches of this replica. No parameter changes. All ranks of a replica must call it."""
        self.module.mean_weights = taken = MeanWeights()
        try:
            self.read_outputs(batches, micro_batches, lambda hidden_BTD: None)
        finally:
            self.module.mean_weights = None
        return MeanWeights().merge([taken])

    def _streamed(self, batches: Batches | None) -> Batches | None:
        """The micro-batches of a step, of which the stage's forward passes learn where documents begin."""
        self._documents = None
        if self._eos is None or batches is None:
            return batches
        self._documents = DocumentStream(batches, self._eos, self.device)
        return self._documents

    def _document_starts(self) -> Tensor | None:
        """Where documents begin in the micro-batch whose forward pass is next; None: attention reaches across documents."""
        return None if self._documents is None else self._documents.take()

    def micro_batch_losses(self) -> list[float]:
        """Losses of the last step's micro-batches on the last stage; empty on the others."""
        return self._micro_batch_losses

    @property
    def transfer_ctas(self) -> int | None:
        """CTAs to which a transfer between stages is limited; None: it is not, or uses none."""
        return None

    def transfer_stats(self) -> dict[str, TransferStats]:
        """Transfers of this stage so far, by direction; the stock engine does not count them."""
        return {}

    def transfer_stats_of_parts(self) -> dict[str, dict[int, TransferStats]]:
        """The same by direction and part of this stage."""
        return {}

    def _use_shape(self, micro_batch_size: int) -> None:
        """Set the micro-batch size of the transfers that follow. (The stock engine announces shapes once: when the size changes,
        make it announce them again.)"""
        shape = (micro_batch_size, self.lime_config.data.sequence_length)
        if self._shape != shape:
            self.reset_activation_shape()
            self._shape = shape

    # -- hang detection -----------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, work: str, ranks: Sequence[int] | None = None) -> Iterator[None]:
        """Watch an operation of this stage: the watchdog ends the process if it takes too long.

        On a GPU most operations return before they have run; so what is timed is the device's work on them.

        Args:
            work: describes the operation in messages.
            ranks: ranks that take part in it, unless ``work`` names them; None: all.

        Raises:
            PeerLost: a connection to another process broke.
        """
        company = self.placement.company(range(len(self.placement.hosts)) if ranks is None else ranks, self.global_rank)
        place = f"stage {self.stage_id} ({self.placement.name(self.global_rank)}), {work}{company}"
        try:
            with self.watchdog.watching(place):
                yield
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            raise PeerLost(
                f"{place}: {self.placement.lost(str(error), ranks, self.global_rank)}; ending the job"
            ) from error

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        """The stock loop, but every instruction is watched and timed."""
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        self.fwd_outputs = []
        counts: dict[str, int] = {}
        for instructions in pipe_schedule:
            for instruction in instructions:
                name = type(instruction).__name__
                counts[name] = counts.get(name, -1) + 1
                with (
                    self.watching(self._describe(instruction, counts[name]), self._partners(instruction)),
                    self.clock.measuring(INSTRUCTIONS[name]),
                    record_function(self._trace_name(instruction, counts[name]))
                    if self.names_instructions
                    else nullcontext(),
                ):
                    MethodType(self._INSTRUCTION_MAP[type(instruction)], self)(**instruction.kwargs)

    def _trace_name(self, instruction: schedule.PipeInstruction, count: int) -> str:
        name = type(instruction).__name__
        if not isinstance(instruction, schedule.BufferOpInstruction):
            return name
        part = f" in part {self._part_of(instruction)}" if len(self.module.stage_parts) > 1 else ""
        return f"{name} of micro-batch {self._micro_batch_of(instruction, count)}{part}"

    def _part_of(self, instruction: schedule.PipeInstruction) -> int:
        """The part of an instruction, among those of all stages."""
        return int(instruction.kwargs.get("part", 0)) * self.num_stages + self.stage_id

    def _micro_batch_of(self, instruction: schedule.PipeInstruction, count: int) -> int:
        """Micro-batch of the ``count``-th instruction of a kind."""
        return count

    def _describe(self, instruction: schedule.PipeInstruction, count: int) -> str:
        """An instruction, the ``count``-th of its kind, with its micro-batch and its peer, for messages."""
        name, step = type(instruction).__name__, f"step {self.global_steps + 1}"
        if not isinstance(instruction, schedule.BufferOpInstruction):
            return f"{name} of {step}"
        count = self._micro_batch_of(instruction, count)
        peer = {"RecvActivation": -1, "SendGrad": -1, "SendActivation": 1, "RecvGrad": 1}.get(name)
        work = f"{name} of micro-batch {count}"
        if len(self.module.stage_parts) > 1:
            work += f" in part {self._part_of(instruction)}"
        if peer is None:
            return f"{work}, {step}"
        stage = (self.stage_id + peer) % self.num_stages
        direction = "from" if name.startswith("Recv") else "to"
        rank = self.placement.name(self._rank_of(stage))
        return f"{work} {direction} stage {stage} ({rank}), {step}"

    def _partners(self, instruction: schedule.PipeInstruction) -> Sequence[int] | None:
        """Ranks that take part in an instruction, besides the peer that `_describe` names; None: all ranks."""
        if isinstance(instruction, schedule.BufferOpInstruction):
            return ()
        if not isinstance(instruction, schedule.ReduceGrads):
            return None
        sharing = [rank for comm in tied_communicators(self.module).values() for rank in comm["ranks"]]
        if shared_parameters(self.lime_config, self.module.bounds):
            sharing += map(self._rank_of, range(self.num_stages))
        return [*self.grid.dp_group, *sharing]

    def _rank_of(self, stage: int) -> int:
        """Rank of a stage of this replica."""
        return int(self.grid.stage_to_global(stage))

    # -- instructions -------------------------------------------------------------------------------------------------

    def _exec_forward_pass(self, buffer_id: int) -> None:
        """The stock method also clones the payload, and adds a hook that refuses a backward pass outside the engine."""
        outputs = self.module(self.pipe_buffers["inputs"][buffer_id], starts_BT=self._document_starts())
        if (wire := self.module.stage_parts[0].wire_out) is not None:
            outputs = outputs.to(wire.wire_dtype)
        self.pipe_buffers["outputs"][buffer_id] = outputs
        if self.is_last_stage():
            self.loss = self._add_loss(outputs, self.pipe_buffers["labels"][buffer_id])

    def _add_loss(self, outputs_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the loss of a micro-batch on the last stage, and add it to the step's total."""
        if self._read_output is not None:
            self._read_output(outputs_BTD)
            return outputs_BTD.new_zeros(())
        share = self._counted_shares.training if torch.is_grad_enabled() else self._evaluated_share
        loss: Tensor = self.module.loss_fn(outputs_BTD, labels_BT, share)
        self.fwd_outputs.append(loss.detach())
        self.total_loss = loss.detach().clone() if self.total_loss is None else self.total_loss + loss.detach()
        return loss

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """One backward pass per stage and micro-batch. Dividing the loss gives the mean over micro-batches."""
        if self.is_last_stage():
            (self.loss / self.micro_batches).backward()
            self.loss = self.loss.detach()
        else:
            self.pipe_buffers["outputs"][buffer_id].backward(self.grad_layer)
        self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_reduce_tied_grads(self) -> None:
        """Nothing to do: the optimizer sums tied gradients in `_exec_reduce_grads`, the next instruction."""

    def _exec_reduce_grads(self) -> None:
        self.optimizer.reduce_gradients(self.total_loss)

    def _exec_optimizer_step(self, lr_kwargs: object = None) -> None:
        self._norms = self.optimizer.step()
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def _aggregate_total_loss(self) -> Tensor:
        """Mean loss of the global batch, on every rank."""
        accumulation_dtype = torch.promote_types(next(self.module.parameters()).dtype, torch.float32)
        loss = torch.zeros((), dtype=accumulation_dtype, device=self.device)
        with self.clock.measuring(WAITING):
            if self.is_last_stage():
                assert self.total_loss is not None
                loss = (self.total_loss / self.micro_batches).to(accumulation_dtype)
                if self.is_data_parallel:
                    dist.all_reduce(loss, group=self.mpu.get_data_parallel_group())
                    loss /= self.dp_world_size
            dist.broadcast(loss, self._rank_of(self.num_stages - 1), group=self.mpu.get_pipe_parallel_group())
            return loss

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.OptimizerStep: _exec_optimizer_step,
    }
