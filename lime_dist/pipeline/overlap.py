"""The engine whose transfers overlap the computation (``pipeline.engine: overlap``).

A payload is received straight into the memory of the history that it belongs to, and what leaves is freed once it has left:
of a micro-batch in flight a stage keeps the autograd graph alone. Shapes follow from the configuration, so nothing is agreed
on between stages, and an evaluation may have another micro-batch size than training.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lime_dist.config.schema import Config
from lime_dist.data.answers import ALL_COUNTED, CountedShares
from lime_dist.model.history import LayerHistory
from lime_dist.pipeline.clock import TRANSFER, Clock
from lime_dist.pipeline.engine import GradientOptimizer, LimeEngine
from lime_dist.pipeline.in_flight import AHEAD
from lime_dist.pipeline.module import LimePipelineModule
from lime_dist.pipeline.schedule import ForwardSchedule, OverlapSchedule
from lime_dist.pipeline.transfer import Receiver, Sender, Traffic


@dataclass
class MicroBatch:
    """What a stage holds of a micro-batch in flight.

    Attributes:
        inputs: tokens [B, T], or the payload received; its ``.grad`` is what is sent back.
        history: the one whose memory the payload landed in.
        labels: [B, T], on the last stage.
        payload: what the next stage is to have; None once it is on its way.
        gradient: of the payload, come back from there.
        edge: where the backward pass begins: the output's place in the autograd graph, without its memory.
        loss: on the last stage.
    """

    inputs: Tensor | None = None
    history: LayerHistory | None = None
    labels: Tensor | None = None
    payload: Tensor | None = None
    gradient: Tensor | None = None
    edge: GradientEdge | None = None
    loss: Tensor | None = None


class OverlapEngine(LimeEngine):
    """Runs `OverlapSchedule`. The buffer id of an instruction is its micro-batch."""

    def __init__(
        self,
        module: LimePipelineModule,
        config: Config,
        optimizer: GradientOptimizer,
        clock: Clock,
        counted_shares: CountedShares = ALL_COUNTED,
    ) -> None:
        super().__init__(module, config, optimizer, clock, counted_shares)
        self._in_flight: dict[int, MicroBatch] = {}
        self._failed = False
        self._from_previous: Receiver[LayerHistory | None] | None = None
        self._from_next: Receiver[None] | None = None
        self._to_next: Sender | None = None
        self._to_previous: Sender | None = None
        for stage in range(self.num_stages - 1):
            self._connect(stage)

    def _connect(self, stage: int) -> None:
        """Make the two directions over the boundary behind ``stage``, of all replicas; called by all ranks together."""
        # The watchdog speaks first: it knows more than the library's own time-out would say.
        patience = timedelta(seconds=2 * self.lime_config.pipeline.timeout + 60)
        for ranks in self.grid.pipe_groups:
            ends = [ranks[stage], ranks[stage + 1]]
            there, back = (dist.new_group(ends, timeout=patience) for _ in range(2))
            if self.global_rank == ends[0]:
                self._to_next, self._from_next = Sender(ends[1], there), Receiver(ends[1], back)
            if self.global_rank == ends[1]:
                self._from_previous, self._to_previous = Receiver(ends[0], there), Sender(ends[0], back)
            # Libraries connect at the first transfer, which both ends must be at: let that not be an early receive.
            greeting = torch.zeros(1, device=self.device)
            for group, sender, receiver in ((there, *ends), (back, *reversed(ends))):
                if self.global_rank == sender:
                    dist.send(greeting, receiver, group=group)
                if self.global_rank == receiver:
                    dist.recv(greeting, sender, group=group)

    def traffic(self) -> dict[str, Traffic]:
        """What this stage has sent and received since it was made, by direction; those that it has."""
        ends = {
            "sent to next": self._to_next,
            "received from previous": self._from_previous,
            "sent to previous": self._to_previous,
            "received from next": self._from_next,
        }
        return {name: end.traffic for name, end in ends.items() if end is not None}

    def _train_schedule(self) -> schedule.PipeSchedule:
        return OverlapSchedule(
            self.micro_batches, self.num_stages, self.stage_id, self.lime_config.pipeline.extra_in_flight
        )

    def _inference_schedule(self, micro_batches: int) -> schedule.PipeSchedule:
        return ForwardSchedule(micro_batches, self.num_stages, self.stage_id)

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        """Raises RuntimeError after a step that an exception ended: its transfers would be taken for this one's."""
        if self._failed:
            raise RuntimeError(
                "an earlier step ended with an exception and left transfers half done; make a new engine"
            )
        self._failed = True
        step = self.global_steps + 1
        with self.watching(f"the first receives of step {step}"):
            self._begin(pipe_schedule)
        super()._exec_schedule(pipe_schedule)
        for sender, direction in ((self._to_next, 1), (self._to_previous, -1)):
            if sender is not None:
                stage = self.stage_id + direction
                peer = f"stage {stage} ({self.placement.name(self._rank_of(stage))})"
                with (
                    self.watching(f"the last transfers to {peer}, step {step}", ranks=()),
                    self.clock.measuring(TRANSFER),
                ):
                    sender.drain()
        self._failed = False

    def _begin(self, pipe_schedule: schedule.PipeSchedule) -> None:
        """Post the first receives, and say how much may be under way: so much that the oldest has arrived for certain when
        the window is full, since what follows from it has come back."""
        assert self._shape is not None
        shape, count = self._shape, pipe_schedule.micro_batches
        training = isinstance(pipe_schedule, OverlapSchedule)
        if self._from_previous is not None:
            self._from_previous.begin(count, lambda: self.module.landing(*shape))
        if self._from_next is not None and training:
            returning = self.module.payload_shape(self.stage_id + 1, *shape)
            self._from_next.begin(count, lambda: (self._empty(returning), None))
        if self._to_next is not None:
            self._to_next.window = pipe_schedule.num_pipe_buffers() + AHEAD
        if self._to_previous is not None:
            self._to_previous.window = self.lime_config.pipeline.extra_in_flight + 2 + AHEAD

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.module.wire_dtype, device=self.device)

    def _micro_batch(self, index: int) -> MicroBatch:
        return self._in_flight.setdefault(index, MicroBatch())

    # -- instructions -------------------------------------------------------------------------------------------------

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        found = self._micro_batch(buffer_id)
        tokens, labels = next(self.data_iterator)
        if self.is_first_stage():
            found.inputs = tokens.to(self.device)
        if self.is_last_stage():
            found.labels = labels.to(self.device)

    def _exec_recv_activations(self, buffer_id: int) -> None:
        assert self._from_previous is not None
        found = self._micro_batch(buffer_id)
        found.inputs, found.history = self._from_previous.take()

    def _exec_forward_pass(self, buffer_id: int) -> None:
        found = self._in_flight[buffer_id]
        assert found.inputs is not None
        training = torch.is_grad_enabled()
        if training and not self.is_first_stage():
            found.inputs.requires_grad_()
        output = self.module(found.inputs, found.history)
        found.history = None  # the graph holds it as long as it needs it
        if self.is_last_stage():
            assert found.labels is not None
            found.loss = self._add_loss(output, found.labels)
        else:
            found.payload = output.detach()
            found.edge = get_gradient_edge(output) if training else None
        if not training and self.is_last_stage():
            del self._in_flight[buffer_id]

    def _exec_send_activations(self, buffer_id: int) -> None:
        found = self._in_flight[buffer_id]
        assert self._to_next is not None and found.payload is not None
        self._to_next.post(found.payload)
        found.payload = None
        if found.edge is None:  # an evaluation
            del self._in_flight[buffer_id]

    def _exec_recv_grads(self, buffer_id: int) -> None:
        assert self._from_next is not None
        self._in_flight[buffer_id].gradient, _ = self._from_next.take()

    def _exec_backward_pass(self, buffer_id: int) -> None:
        found = self._in_flight[buffer_id]
        if found.loss is not None:
            (found.loss / self.micro_batches).backward()
        else:
            assert found.edge is not None
            torch.autograd.backward([found.edge], [found.gradient])
        found.loss = found.edge = found.gradient = None
        if self.is_first_stage():
            del self._in_flight[buffer_id]

    def _exec_send_grads(self, buffer_id: int) -> None:
        found = self._in_flight.pop(buffer_id)
        assert self._to_previous is not None and found.inputs is not None and found.inputs.grad is not None
        self._to_previous.post(found.inputs.grad)

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **LimeEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _exec_load_micro_batch,
        schedule.RecvActivation: _exec_recv_activations,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.SendActivation: _exec_send_activations,
        schedule.RecvGrad: _exec_recv_grads,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.SendGrad: _exec_send_grads,
    }
