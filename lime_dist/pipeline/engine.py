"""DeepSpeed's PipelineEngine with the parts that a layer history and a correct gradient norm need replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from lime_dist.model.decoder import EMBEDDING
from lime_dist.pipeline.module import LimePipelineModule

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


class GradientOptimizer(Protocol):
    """What the engine needs of an optimizer; `train/optim.py` has the one there is."""

    def reduce_gradients(self) -> None: ...

    def step(self) -> bool: ...


class LimeEngine(PipelineEngine):
    """Runs the stock schedule; gradients, norm, clipping and the update belong to ``optimizer``, set before the first step."""

    optimizer: GradientOptimizer
    total_loss: Tensor | None

    def __init__(self, module: LimePipelineModule, config: Config) -> None:
        world_size = dist.get_world_size()
        settings = deepspeed_config(config, world_size)
        mpu = module.mpu()
        super().__init__(args=None, model=module, config=settings, config_class=DeepSpeedConfig(settings, mpu), mpu=mpu)
        self._shape_purpose = ""
        self.timers = NoopTimer()  # the stock one keeps two CUDA events a step for ever

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

    def train_step(self, batches: Batches | None) -> float:
        """One step over all micro-batches; returns the mean loss over the global batch (nats per token), on every rank."""
        self._use_shape("train")
        return float(self.train_batch(batches))

    def evaluate(self, batches: Batches | None, micro_batches: int) -> float:
        """Mean loss over ``micro_batches`` micro-batches of every replica, on every rank; changes nothing."""
        self._use_shape("evaluate")
        loss = float(self.eval_batch(batches, num_micro_batches=micro_batches))
        self.pipe_buffers["outputs"] = [None] * self.num_pipe_buffers  # the last logits
        return loss

    def _use_shape(self, purpose: str) -> None:
        """The stock engine agrees on a payload's shape once; make it agree again when the purpose changes."""
        if self._shape_purpose != purpose:
            self.reset_activation_shape()
            self._shape_purpose = purpose

    # -- instructions -------------------------------------------------------------------------------------------------

    def _exec_forward_pass(self, buffer_id: int) -> None:
        """Stock: also clones the payload, and hooks the output so that backward outside the engine is refused."""
        outputs = self.module(self.pipe_buffers["inputs"][buffer_id])
        self.pipe_buffers["outputs"][buffer_id] = outputs
        if self.is_last_stage():
            self.loss = self.module.loss_fn(outputs, self.pipe_buffers["labels"][buffer_id])
            loss = self.loss.detach()
            self.fwd_outputs.append(loss)
            self.total_loss = loss.clone() if self.total_loss is None else self.total_loss + loss

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
        self.optimizer.reduce_gradients()

    def _exec_optimizer_step(self, lr_kwargs: object = None) -> None:
        self.optimizer.step()
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def _aggregate_total_loss(self) -> Tensor:
        """The global batch's mean loss on every rank."""
        loss = torch.zeros((), device=self.device)
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
