"""One of the two processes of `pipeline_cost.py`: build every variant, run the rounds, write the measurements."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from copying import copying_layer, random_batch
from deepspeed.runtime.pipe import schedule
from pipeline_cost import AGAIN, VARIANTS, again_bytes, make_config
from torch import Tensor

from lime_dist.config.registry import SCHEDULES
from lime_dist.distributed import quiet, start_processes
from lime_dist.model.decoder import apply_norm, embed
from lime_dist.model.weight_gradients import WeightGradients
from lime_dist.pipeline.clock import WAITING, Clock
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.pipeline.module import LimePipelineModule
from lime_dist.pipeline.overlap import OverlapEngine
from lime_dist.pipeline.process_groups import stage_process_groups
from lime_dist.pipeline.stage_schedule import BackwardInput
from lime_dist.pipeline.wire import Wire
from lime_dist.train.build import make_stage_optimizer

Payload = tuple[Tensor, Tensor]


class TupleModule(LimePipelineModule):
    """A module that passes hidden state and history to the next stage as a tuple of two tensors; every layer copies the history."""

    def forward(self, inputs: Any, history: Any = None, part: int = 0, starts_BT: Tensor | None = None) -> Any:
        functions, config = self.forward_funcs, self.config.model
        if self.embeds_tokens:
            hidden = embed(config, functions[0], inputs)
            history = hidden.new_empty(0, 2, inputs.numel(), config.head_size)
        else:
            hidden, history = inputs
        for layer in self._layers():
            hidden, history = copying_layer(layer, hidden, history)
        if self.holds_head:
            return apply_norm(config, functions[-2], hidden)
        return hidden, history


class TupleEngine(LimeEngine):
    """DeepSpeed's way with a tuple: inputs are cloned, and backward runs once for each tensor of the output."""

    def _exec_forward_pass(self, buffer_id: int) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        inputs = tuple(t.clone() for t in inputs) if isinstance(inputs, tuple) else inputs.clone()
        outputs = self.module(inputs)
        self.pipe_buffers["outputs"][buffer_id] = outputs
        if self.is_last_stage():
            self.loss = self._add_loss(outputs, self.pipe_buffers["labels"][buffer_id])

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if self.is_last_stage():
            (self.loss / self.micro_batches).backward()
        else:
            outputs = self.pipe_buffers["outputs"][buffer_id]
            for index, (output, gradient) in enumerate(zip(outputs, self.grad_layer, strict=True)):
                output.backward(gradient=gradient, retain_graph=index < len(outputs) - 1)
        self.pipe_buffers["outputs"][buffer_id] = None

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **LimeEngine._INSTRUCTION_MAP,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
    }


@dataclass(frozen=True)
class AgainWire(Wire):
    """Sends as many bytes as if a stage received every entry again for each of its parts: the payload, and memory behind it."""

    sent_bytes: int = 0

    @property
    def is_identity(self) -> bool:
        return False

    def empty(self, payload_shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.empty(self.sent_bytes // self.wire_dtype.itemsize, dtype=self.wire_dtype, device=device)

    def encode(self, payload: Tensor) -> Tensor:
        sent = self.empty(tuple(payload.shape), payload.device)
        sent[: payload.numel()] = payload.reshape(-1)
        return sent

    def decode(self, sent: Tensor, payload: Tensor) -> Tensor:
        payload.view(-1).copy_(sent[: payload.numel()])
        return payload


class AgainModule(LimePipelineModule):
    """A module with several parts a stage whose stages send every entry again, and do not use it."""

    def _wire(self, boundary: int) -> Wire:
        own = super()._wire(boundary)
        size = again_bytes(self.config, self.bounds)[boundary - 1]
        return AgainWire(own.wire_format, own.dtype, own.wire_dtype, size)


def module_class(engine: str) -> type[LimePipelineModule]:
    return TupleModule if engine == "stock-tuple" else AgainModule if engine in AGAIN else LimePipelineModule


def build(settings: dict[str, Any], variant: str) -> LimeEngine:
    engine_name, model = VARIANTS[variant]
    config = make_config(settings, engine_name, model, 2)
    module = module_class(engine_name)(config)
    clock = Clock(next(module.parameters()).device)
    optimizer = make_stage_optimizer(config, module.exported_parameters, stage_process_groups(module), clock)
    engine_class = TupleEngine if engine_name == "stock-tuple" else SCHEDULES[config.pipeline.schedule].engine_class()
    engine: LimeEngine = engine_class(module, config, optimizer, clock)
    return engine


def time_instructions(engine: LimeEngine, taken: dict[str, list[float]]) -> None:
    """Record the seconds of every forward and backward pass, without weight gradients that it leaves, and of the update."""

    def timed(function: Any, name: str) -> Any:
        def run(self: LimeEngine, **arguments: Any) -> None:
            begin = time.perf_counter()
            function(self, **arguments)
            taken[f"{name} {arguments.get('part', 0)}"].append(time.perf_counter() - begin)

        return run

    kinds = {schedule.ForwardPass: "forward", schedule.BackwardPass: "backward", BackwardInput: "backward",
             schedule.OptimizerStep: "update"}  # fmt: skip
    table = dict(engine._INSTRUCTION_MAP)
    table.update({kind: timed(table[kind], name) for kind, name in kinds.items() if kind in table})
    engine.__dict__["_INSTRUCTION_MAP"] = table  # of this engine alone


def time_weight_gradients(spent: dict[str, float]) -> None:
    """Add up the seconds of weight gradients that are computed apart, whenever that is."""
    compute = WeightGradients.compute_next

    def timed(gradients: WeightGradients, gradient_of: Any) -> None:
        begin = time.perf_counter()
        compute(gradients, gradient_of)
        spent["weights"] = spent.get("weights", 0.0) + time.perf_counter() - begin

    WeightGradients.compute_next = timed  # type: ignore[assignment]  # of this process alone


def count_stock_bytes(counts: dict[str, int]) -> None:
    """Count the bytes that the stock engine sends forwards, without the messages that announce shapes."""
    from deepspeed.runtime.pipe import p2p

    send = p2p.send

    def counted(tensor: Tensor, stage: int, async_op: bool = False) -> Any:
        if tensor.is_floating_point():
            counts["sent"] = counts.get("sent", 0) + tensor.nbytes
        return send(tensor, stage, async_op)

    p2p.send = counted


def link_speed(rank: int) -> tuple[float, float]:
    """Return the bytes per second of a large transfer from the first process, and the seconds of half a small round trip."""

    def transfer(size: int) -> float:
        data = torch.zeros(size // 4)
        dist.barrier()
        begin = time.perf_counter()
        if rank == 0:
            dist.send(data, 1)
            dist.recv(data[:1], 1)
        else:
            dist.recv(data, 0)
            dist.send(data[:1], 0)
        return time.perf_counter() - begin

    transfer(1 << 20)
    round_trip = min(transfer(4) for _ in range(5))
    size = 1 << 25
    return size / (min(transfer(size) for _ in range(2)) - round_trip / 2), round_trip / 2


def micro_batches(settings: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield random_batch(settings["batch"], settings["length"], settings["vocabulary"], "cpu")


def main() -> None:
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    start_processes()
    rank = dist.get_rank()
    counts: dict[str, int] = {}
    count_stock_bytes(counts)
    spent: dict[str, float] = {}
    time_weight_gradients(spent)
    bandwidth, latency = link_speed(rank)
    names: list[str] = settings["variants"]
    engines: dict[str, LimeEngine] = {}
    taken: dict[str, dict[str, list[float]]] = {}
    for variant in names:
        with quiet():
            engines[variant] = build(settings, variant)
        taken[variant] = defaultdict(list)
        time_instructions(engines[variant], taken[variant])
    seconds: dict[str, list[float]] = {variant: [] for variant in names}
    sent: dict[str, int] = {}
    for turn in range(settings["rounds"] + 1):
        for variant in names[turn % len(names) :] + names[: turn % len(names)]:
            engine = engines[variant]
            before, waited = sent_forwards(engine, counts), engine.clock.totals()[WAITING]
            spent.clear()
            dist.barrier()
            begin = time.perf_counter()
            engine.train_step(micro_batches(settings))
            dist.barrier()
            elapsed = time.perf_counter() - begin
            sent[variant] = sent_forwards(engine, counts) - before
            taken[variant]["weights"].append(spent.get("weights", 0.0) / settings["micro_batches"])
            taken[variant]["waiting"].append(engine.clock.totals()[WAITING] - waited)
            if rank == 0:
                print(
                    f"{settings['link']}: round {turn} of {settings['rounds']}: {variant} {elapsed:.2f} s", flush=True
                )
            if turn == 0:
                taken[variant].clear()
            else:
                seconds[variant].append(elapsed)
    measured = {
        variant: {
            "seconds": seconds[variant],
            "bytes": sent[variant],
            "stage": stage_seconds(taken[variant]),
        }
        for variant in names
    }
    (folder / f"{rank}.json").write_text(json.dumps({"bandwidth": bandwidth, "latency": latency, "variants": measured}))
    dist.barrier()


def stage_seconds(taken: dict[str, list[float]]) -> dict[str, Any]:
    """Return the medians of what was recorded; ``parts``: of the forward and backward passes by part. Backward includes the weight
    gradients that come apart."""
    medians = {name: statistics.median(values) for name, values in taken.items()}
    count = sum(name.startswith("forward ") for name in medians)
    parts = [(medians[f"forward {part}"], medians[f"backward {part}"] + medians["weights"]) for part in range(count)]
    return {"parts": parts, "update": medians["update 0"], **{key: medians[key] for key in ("weights", "waiting")}}


def sent_forwards(engine: LimeEngine, counts: dict[str, int]) -> int:
    """Return the bytes of payloads that this process has sent so far. With DeepSpeed's engine, the first process sends nothing else."""
    if isinstance(engine, OverlapEngine):
        return sum(stats.bytes for name, stats in engine.transfer_stats().items() if name == "sent to next")
    return counts.get("sent", 0)


if __name__ == "__main__":
    main()
