"""The engine whose transfers overlap the computation (``pipeline.engine: overlap``).

A payload is received into the memory of the history that it belongs to, and a sent payload is freed once its send has
completed: for each micro-batch in flight, a stage keeps only the autograd graph. Shapes follow from the configuration, so stages do
not negotiate them, and an evaluation may have another micro-batch size than training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lime_dist.config.schema import Config
from lime_dist.data.answers import ALL_COUNTED, CountedShares
from lime_dist.distributed import group_timeout
from lime_dist.model.history import LayerHistory, separate_view
from lime_dist.model.weight_gradients import WeightGradients, deferring
from lime_dist.pipeline.clock import COMPUTATION, TRANSFER, Clock
from lime_dist.pipeline.engine import GradientOptimizer, LimeEngine
from lime_dist.pipeline.memory import offloads_history
from lime_dist.pipeline.module import LimePipelineModule
from lime_dist.pipeline.process_groups import limits_ctas, transfer_options
from lime_dist.pipeline.schedules.base import BACKWARDS, RECV_ACTIVATION, RECV_GRAD, Pass, make_schedule
from lime_dist.pipeline.schedules.overlapped import OverlappedSchedule
from lime_dist.pipeline.stage_schedule import BackwardInput, BackwardWeight, EvaluationStage, TrainingStage
from lime_dist.pipeline.transfer import Receiver, Sender, TransferStats
from lime_dist.pipeline.waiting_histories import WaitingHistories


@dataclass
class MicroBatch:
    """What a stage holds of a micro-batch in flight, for one of its parts.

    Attributes:
        inputs: tokens [B, T], or the payload: before the forward pass as it was received (`LimePipelineModule.landing`).
        history: the history whose memory the payload is part of.
        labels: [B, T], on the last stage.
        payload: the output for the next part, as it travels; None once its send has been posted.
        gradient: of the payload, as it was received from the stage of the next part.
        returned: gradient of ``inputs`` for the previous part, as it travels.
        edge: the output's place in the autograd graph, without the output's memory; the backward pass starts from it.
        loss: on the last stage.
        weights: where the backward pass leaves weight gradients, if its schedule splits backward passes.
    """

    inputs: Tensor | None = None
    history: LayerHistory | None = None
    labels: Tensor | None = None
    payload: Tensor | None = None
    gradient: Tensor | None = None
    returned: Tensor | None = None
    edge: GradientEdge | None = None
    loss: Tensor | None = None
    weights: WeightGradients | None = None


class OverlapEngine(LimeEngine):
    """Runs any `OverlappedSchedule`. The ``buffer_id`` of an instruction is the index of its micro-batch; ``part`` counts the parts of
    this stage."""

    def __init__(
        self,
        module: LimePipelineModule,
        config: Config,
        optimizer: GradientOptimizer,
        clock: Clock,
        counted_shares: CountedShares = ALL_COUNTED,
        eos: int | None = None,
    ) -> None:
        super().__init__(module, config, optimizer, clock, counted_shares, eos)
        self._in_flight: dict[Pass, MicroBatch] = {}
        self._shared: dict[int, tuple[LayerHistory | None, Tensor | None]] = {}  # by micro-batch: `_shared_by_parts`
        self._held_back: dict[int, WeightGradients] = {}  # by micro-batch, the oldest one first
        self._backwards_left = 0  # in this step
        self._failed = False
        self._waiting = WaitingHistories(self.device) if offloads_history(config) else None
        self._from_previous: Receiver[LayerHistory | None] | None = None
        self._from_next: Receiver[None] | None = None
        self._to_next: Sender | None = None
        self._to_previous: Sender | None = None
        has_ring = config.parallel.parts_per_stage > 1  # the last stage also sends to the first one
        for stage in range(self.num_stages if has_ring else self.num_stages - 1):
            self._connect(stage)

    def _connect(self, stage: int) -> None:
        """Connect both directions of the boundary behind ``stage``, for all replicas. All ranks must call this together."""
        limit = group_timeout(self.lime_config.pipeline.timeout)
        ctas = self.lime_config.pipeline.transfer_ctas
        for ranks in self.grid.pipe_groups:
            ends = [ranks[stage], ranks[(stage + 1) % len(ranks)]]
            there, back = (dist.new_group(ends, timeout=limit, pg_options=transfer_options(ctas)) for _ in range(2))
            if self.global_rank == ends[0]:
                self._to_next, self._from_next = self._sender(ends[1], there), Receiver(ends[1], back)
            if self.global_rank == ends[1]:
                self._from_previous, self._to_previous = Receiver(ends[0], there), self._sender(ends[0], back)
            # gloo and NCCL connect at the first transfer, in which both ends must take part: not an early receive.
            greeting = torch.zeros(1, device=self.device)
            for group, sender, receiver in ((there, *ends), (back, *reversed(ends))):
                if self.global_rank == sender:
                    dist.send(greeting, receiver, group=group)
                if self.global_rank == receiver:
                    dist.recv(greeting, sender, group=group)

    def _sender(self, peer: int, group: dist.ProcessGroup) -> Sender:
        return Sender(peer, group, is_queued=dist.get_backend(group) == dist.Backend.NCCL)

    @property
    def transfer_ctas(self) -> int | None:
        return self.lime_config.pipeline.transfer_ctas if self.num_stages > 1 and limits_ctas() else None

    def transfer_stats(self) -> dict[str, TransferStats]:
        """What this stage has sent and received since the engine was made, by direction. With one part a stage, the first and the last
        stage have two of the four."""
        return {name: end.stats for name, end in self._ends.items()}

    def transfer_stats_of_parts(self) -> dict[str, dict[int, TransferStats]]:
        """The same by direction and part of this stage."""
        return {name: dict(end.by_part) for name, end in self._ends.items()}

    @property
    def _ends(self) -> dict[str, Sender | Receiver[Any]]:
        ends = {
            "sent to next": self._to_next,
            "received from previous": self._from_previous,
            "sent to previous": self._to_previous,
            "received from next": self._from_next,
        }
        return {name: end for name, end in ends.items() if end is not None}

    def _schedule(self, micro_batches: int) -> OverlappedSchedule:
        configured = make_schedule(self.lime_config, micro_batches)
        assert isinstance(configured, OverlappedSchedule)
        return configured

    def _train_schedule(self) -> schedule.PipeSchedule:
        return TrainingStage(self._schedule(self.micro_batches), self.stage_id)

    def _inference_schedule(self, micro_batches: int) -> schedule.PipeSchedule:
        return EvaluationStage(self._schedule(micro_batches), self.stage_id)

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        """Raises RuntimeError if an exception ended an earlier step: its pending transfers would be mistaken for this step's."""
        if self._failed:
            raise RuntimeError(
                "an earlier step ended with an exception and left transfers half done; make a new engine"
            )
        self._failed = True
        step = self.global_steps + 1
        self._begin(pipe_schedule)
        super()._exec_schedule(pipe_schedule)
        for sender, direction in ((self._to_next, 1), (self._to_previous, -1)):
            if sender is not None:
                stage = (self.stage_id + direction) % self.num_stages
                peer = f"stage {stage} ({self.placement.name(self._rank_of(stage))})"
                with (
                    self.watching(f"the last transfers to {peer}, step {step}", ranks=()),
                    self.clock.measuring(TRANSFER),
                ):
                    sender.drain()
        self._failed = False

    def _micro_batch_of(self, instruction: schedule.PipeInstruction, count: int) -> int:
        return int(instruction.kwargs["buffer_id"])

    def _begin(self, pipe_schedule: schedule.PipeSchedule) -> None:
        """Announce the receives of a step and set the windows of the senders."""
        assert self._shape is not None and isinstance(pipe_schedule, TrainingStage | EvaluationStage)
        shape, configured = self._shape, pipe_schedule.schedule
        is_training = isinstance(pipe_schedule, TrainingStage)
        fills_waits = is_training and configured.splits_backward and self._sees_arrivals
        meanwhile = self._go_on_with_weights if fills_waits else None
        payload_window = configured.evaluation_window()
        self._backwards_left = sum(each.kind in BACKWARDS for each in pipe_schedule.instructions())
        for sender in (self._to_next, self._to_previous):
            if sender is not None:
                sender.release()  # the device has come to the end of the last step
        if self._from_previous is not None:
            coming = iter(pipe_schedule.parts_of(RECV_ACTIVATION))
            ahead = pipe_schedule.receives_ahead(RECV_ACTIVATION)
            self._from_previous.begin(ahead, lambda: self.module.landing(*shape, part=next(coming)), meanwhile)
        if is_training:
            if self._waiting is not None:
                self._waiting.begin_step(configured.micro_batches_in_flight(self.stage_id))
            payload_window = configured.payload_window(self.stage_id)
            if self._from_next is not None:
                returning = iter(pipe_schedule.parts_of(RECV_GRAD))
                ahead = pipe_schedule.receives_ahead(RECV_GRAD)
                self._from_next.begin(
                    ahead, lambda: (self.module.gradient_landing(*shape, part=next(returning)), None), meanwhile
                )
            if self._to_previous is not None:
                self._to_previous.window = configured.gradient_window(self.stage_id)
        if self._to_next is not None:
            self._to_next.window = payload_window

    @property
    def _sees_arrivals(self) -> bool:
        """Whether the host knows which of its receives are over. On a GPU it has queued what comes after them."""
        return self.device.type == "cpu"

    # -- instructions -------------------------------------------------------------------------------------------------

    def _exec_load_micro_batch(self, buffer_id: int, part: int = 0) -> None:
        """Load tokens for the first part of the stage, and labels for its last one."""
        last = len(self.module.stage_parts) - 1
        assert self.data_iterator is not None
        tokens, labels = next(self.data_iterator)
        if self.module.embeds_tokens:
            self._micro_batch(buffer_id, part).inputs = tokens.to(self.device, non_blocking=True)
        if self.module.holds_head:
            self._micro_batch(buffer_id, last).labels = labels.to(self.device, non_blocking=True)

    def _micro_batch(self, buffer_id: int, part: int) -> MicroBatch:
        return self._in_flight.setdefault(Pass(buffer_id, part), MicroBatch())

    def _exec_recv_activations(self, buffer_id: int, part: int = 0) -> None:
        assert self._from_previous is not None
        micro_batch = self._micro_batch(buffer_id, part)
        micro_batch.inputs, micro_batch.history = self._from_previous.take(part)

    def _exec_forward_pass(self, buffer_id: int, part: int = 0) -> None:
        micro_batch, own = self._in_flight[Pass(buffer_id, part)], self.module.stage_parts[part]
        assert micro_batch.inputs is not None and self._shape is not None
        training = torch.is_grad_enabled()
        if not own.embeds_tokens:
            micro_batch.inputs, micro_batch.history = self.module.arrived(
                micro_batch.inputs, micro_batch.history, *self._shape, part=part
            )
            micro_batch.inputs.requires_grad_(training)
        history, starts_BT = self._shared_by_parts(buffer_id, part, micro_batch.history)
        waiting = self._waiting if training else None
        if waiting is not None:
            history = history or self.module.new_history(*self._shape)
            assert history is not None
        micro_batch.weights = self.deferred_gradients() if training else None
        with deferring(micro_batch.weights):
            output = self.module(micro_batch.inputs, history, part, starts_BT)
        if waiting is not None:
            assert history is not None
            waiting.after_forward(buffer_id, separate_view(history.memory, tuple(history.memory.shape)))
        del history
        micro_batch.history = None  # the graph holds it as long as it needs it
        if own.holds_head:
            assert micro_batch.labels is not None
            micro_batch.loss = self._add_loss(output, micro_batch.labels)
        else:
            assert own.wire_out is not None
            micro_batch.payload = own.wire_out.encode(output.detach())
            micro_batch.edge = get_gradient_edge(output) if training else None
        if not training and own.holds_head:
            del self._in_flight[Pass(buffer_id, part)]

    def _shared_by_parts(
        self, buffer_id: int, part: int, landed: LayerHistory | None
    ) -> tuple[LayerHistory | None, Tensor | None]:
        """What all parts of the stage share of a micro-batch, for the forward pass of one: its history, and where documents begin.

        Args:
            landed: the history that the first part's payload has been received into, if it has.
        """
        last = len(self.module.stage_parts) - 1
        if last == 0:
            return landed, self._document_starts()
        if part == 0:
            assert self._shape is not None
            history = landed or self.module.new_history(*self._shape)
            self._shared[buffer_id] = history, self._document_starts()
        return self._shared.pop(buffer_id) if part == last else self._shared[buffer_id]

    def _exec_send_activations(self, buffer_id: int, part: int = 0) -> None:
        micro_batch = self._in_flight[Pass(buffer_id, part)]
        assert self._to_next is not None and micro_batch.payload is not None
        self._to_next.post(micro_batch.payload, part)
        micro_batch.payload = None
        if micro_batch.edge is None:  # an evaluation
            del self._in_flight[Pass(buffer_id, part)]

    def _exec_recv_grads(self, buffer_id: int, part: int = 0) -> None:
        assert self._from_next is not None
        self._in_flight[Pass(buffer_id, part)].gradient, _ = self._from_next.take(part)

    def _exec_backward_pass(self, buffer_id: int, part: int = 0) -> None:
        micro_batch, own = self._in_flight[Pass(buffer_id, part)], self.module.stage_parts[part]
        self._backwards_left -= 1
        if self._backwards_left == 0 and len(self.module.stage_parts) == 1:
            self.optimizer.begin_last_pass()
        if self._waiting is not None:
            self._waiting.before_backward()
        if micro_batch.loss is not None:
            (micro_batch.loss / self.micro_batches).backward()
        else:
            assert micro_batch.edge is not None and micro_batch.gradient is not None and self._shape is not None
            micro_batch.gradient = self.module.arrived_gradient(micro_batch.gradient, *self._shape, part=part)
            torch.autograd.backward([micro_batch.edge], [micro_batch.gradient])
        if self._waiting is not None:
            self._waiting.after_backward()
        micro_batch.loss = micro_batch.edge = micro_batch.gradient = None
        if micro_batch.weights is not None:
            self._held_back[buffer_id] = micro_batch.weights
        if own.embeds_tokens:
            del self._in_flight[Pass(buffer_id, part)]
        else:
            assert own.wire_in is not None and micro_batch.inputs is not None
            assert micro_batch.inputs.grad is not None
            micro_batch.returned = own.wire_in.encode(micro_batch.inputs.grad)
            micro_batch.inputs = None

    def _exec_send_grads(self, buffer_id: int, part: int = 0) -> None:
        micro_batch = self._in_flight.pop(Pass(buffer_id, part))
        assert self._to_previous is not None and micro_batch.returned is not None
        self._to_previous.post(micro_batch.returned, part)

    def _exec_backward_weight(self, buffer_id: int, part: int = 0) -> None:
        """Compute what is left of the weight gradients. Micro-batches come in their order, so that every sum has the same order,
        whatever has been computed while the stage waited."""
        gradients = self._held_back[buffer_id]
        while gradients:
            self._compute_next(gradients)
        del self._held_back[buffer_id]

    def _compute_next(self, gradients: WeightGradients) -> None:
        """Compute a weight gradient. If none of this weight is left in the step, its sum over replicas can start."""
        weight = gradients.compute_next(self.optimizer.gradient_of)
        if self._backwards_left == 0 and not any(each.holds(weight) for each in self._held_back.values()):
            self.optimizer.gradient_is_final(weight)

    def _go_on_with_weights(self) -> bool:
        """Compute one of the weight gradients that are held back, of the oldest micro-batch; returns whether there was one."""
        for micro_batch, gradients in self._held_back.items():
            if gradients:
                place = f"{BackwardWeight.__name__} of micro-batch {micro_batch}, step {self.global_steps + 1}"
                with self.watching(place, ranks=()), self.clock.measuring(COMPUTATION):
                    self._compute_next(gradients)
                return True
        return False

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **LimeEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _exec_load_micro_batch,
        schedule.RecvActivation: _exec_recv_activations,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.SendActivation: _exec_send_activations,
        schedule.RecvGrad: _exec_recv_grads,
        schedule.BackwardPass: _exec_backward_pass,
        BackwardInput: _exec_backward_pass,
        BackwardWeight: _exec_backward_weight,
        schedule.SendGrad: _exec_send_grads,
    }
