"""Protects histories that wait in host memory: results do not change, the device holds as few as planned, and on a GPU nothing uses memory
before the kernels and copies that used it earlier have ended."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pipeline.test_equality import ROUTES, check_equal, policy_settings, settings
from support.policies import POLICIES
from support.workers import WorkerGroup

from lime_dist import load_config
from lime_dist.config.load import make_config
from lime_dist.errors import LimeError
from lime_dist.model.history import LayerHistory
from lime_dist.pipeline import waiting_histories
from lime_dist.pipeline.memory import HISTORIES_ON_DEVICE, host_buffers, offloads_history, pinned
from lime_dist.pipeline.waiting_histories import WaitingHistories
from lime_dist.plan.forecast import Machine, forecast

Workers = Callable[[int], WorkerGroup]


def train_and_watch(values: dict[str, Any], steps: int, evaluation_micro_batch_size: int = 0) -> dict[str, Any]:
    """Worker case: `train_steps`, in which the memory that a history is copied back to holds NaN before. Also the histories that leave in
    a step, the most that are on the device, at any time and in backward passes, and the bytes of host memory."""
    from support.cases import train_steps

    from lime_dist.pipeline.module import LimePipelineModule

    resize, make = waiting_histories.resize, LimePipelineModule.new_history
    allocate, begin = WaitingHistories._host_memory, WaitingHistories.before_backward
    here, on_host, seen = set[int](), dict[int, int](), Counter[str]()

    def note(what: str) -> None:
        seen[what] = max(seen[what], len(here))

    def resized(storage: torch.UntypedStorage, nbytes: int) -> None:
        resize(storage, nbytes)
        if nbytes:
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)
            here.add(storage._cdata)
            note("most")
        else:
            seen["left"] += 1
            here.remove(storage._cdata)

    def made(module: LimePipelineModule, *arguments: Any) -> LayerHistory | None:
        history = make(module, *arguments)
        if offloads_history(module.config):
            storage = history.memory.untyped_storage()
            here.add(storage._cdata)
            weakref.finalize(history, here.discard, storage._cdata).atexit = False
            note("most")
        return history

    def allocated(waiting: WaitingHistories, memory: torch.Tensor) -> torch.Tensor:
        host = allocate(waiting, memory)
        on_host[host.data_ptr()] = pinned(host.nbytes)
        return host

    def begun(waiting: WaitingHistories) -> None:
        begin(waiting)
        note("most in backward")

    waiting_histories.resize, LimePipelineModule.new_history = resized, made  # type: ignore[method-assign]  # for this case only
    WaitingHistories._host_memory, WaitingHistories.before_backward = allocated, begun  # type: ignore[method-assign]  # likewise
    try:
        result = train_steps(values, steps, evaluation_micro_batch_size)
    finally:
        waiting_histories.resize, LimePipelineModule.new_history = resize, make  # type: ignore[method-assign]  # put back
        WaitingHistories._host_memory, WaitingHistories.before_backward = allocate, begin  # type: ignore[method-assign]  # likewise
    return result | seen | {"left": seen["left"] / steps, "host": sum(on_host.values())}


WATCHED = f"{__name__}.train_and_watch"


def offloading(values: dict[str, Any], stages: int, **pipeline: Any) -> dict[str, Any]:
    """Eight micro-batches, of which the first stage has seven in flight."""
    values["train"] = {**values["train"], "global_batch_size": 8, "micro_batch_size": 1}
    values["parallel"] = {**values["parallel"], "pipeline_stages": stages, "offload_history": True}
    values["pipeline"] = {"extra_in_flight": 6 // (stages - 1) - 1, **pipeline}
    return values


def check(values: dict[str, Any], group: WorkerGroup, **options: Any) -> None:
    """Results are those of one process, histories do leave the first stage, and the plan knows the host memory of all."""
    results = check_equal(values, group, worker=WATCHED, **options)
    first, *_, last = results
    assert (first["left"], last["left"]) == (6, 0)
    assert (first["most"], first["most in backward"]) == (HISTORIES_ON_DEVICE + 1, HISTORIES_ON_DEVICE)
    planned = forecast(make_config(values, "a test"), Machine(1e12, 1e12, 1e12, 0.0), len(results))
    assert [result["host"] for result in results] == [stage.memory.host for stage in planned.stages]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("routes", list(ROUTES))
@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy(workers: Workers, policy: str, routes: str, checkpointing: bool) -> None:
    stages = 2 if checkpointing else 3
    values = policy_settings(routes, policy, "fp64", activation_checkpointing=checkpointing)
    check(offloading(values, stages, boundary="entries" if checkpointing else "minimal"), workers(stages), steps=2)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize(
    "model",
    ["moda", "moda, MLP, chunked", "attention residuals", "attention residuals, full", "hidden top_p"],
)
def test_other_models(workers: Workers, model: str, schedule: str) -> None:
    values = settings(model, 4, schedule == "1f1b", "fp64", activation_checkpointing="selective")
    check(offloading(values, 2, schedule=schedule), workers(2), steps=2, evaluation=2)


@pytest.mark.parametrize(("routes", "wire"), [("kv", "fp8"), ("static", None)])
def test_the_same_to_the_last_bit(workers: Workers, routes: str, wire: str | None) -> None:
    """In bf16, over two replicas with ZeRO 1; float8 payloads are decoded into the memory of histories."""
    values = offloading(policy_settings(routes, "chunked", "bf16", zero_stage=1), 2, wire_dtype=wire)
    values["train"]["global_batch_size"] = 16
    moved = workers(4).run(WATCHED, values=values, steps=3)
    assert [each["left"] for each in moved if each["stage"] == 0] == [6, 6]
    values["parallel"]["offload_history"] = False
    for one, other in zip(moved, workers(4).run("support.cases.train_steps", values=values, steps=3), strict=True):
        assert one["losses"] == other["losses"] and one["norms"] == other["norms"]
        assert all(torch.equal(one["parameters"][name], other["parameters"][name]) for name in other["parameters"])


@pytest.mark.parametrize("model", ["llama", "value residual"])
def test_models_whose_history_stays(workers: Workers, model: str) -> None:
    first, _ = check_equal(offloading(settings(model, 4, True, "fp64"), 2), workers(2), 2, worker=WATCHED)
    assert first["left"] == 0


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 5])
def test_few_micro_batches(workers: Workers, micro_batches: int) -> None:
    """With up to three nothing leaves."""
    values = offloading(policy_settings("static", "full", "fp64"), 2)
    values["train"]["global_batch_size"] = micro_batches
    first, _ = check_equal(values, workers(2), 2, 1, worker=WATCHED)
    assert first["left"] == (micro_batches - 2 if micro_batches > HISTORIES_ON_DEVICE else 0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pipeline.schedule=interleaved", "parallel.virtual_stages=2", "parallel.pipeline_stages=2"],
        ["pipeline.schedule=stock", "parallel.pipeline_stages=2"],
    ],
)
def test_schedules_that_refuse(overrides: list[str]) -> None:
    with pytest.raises(
        LimeError, match="parallel.offload_history=true does not work with pipeline.schedule="
    ) as caught:
        load_config(None, [*overrides, "parallel.offload_history=true"])
    assert "\n" not in str(caught.value)


# -- the order of copies on a GPU ----------------------------------------------------------------------------------------


class Queue:
    """A stream that knows what it has waited for: for each stream, how many of its operations are over when this one goes on."""

    def __init__(self) -> None:
        self.number = 0
        self.over: dict[Queue, int] = {}

    def record_event(self) -> dict[Queue, int]:
        return {**self.over, self: self.number}

    def wait_event(self, event: dict[Queue, int]) -> None:
        for queue in event.keys() - {self}:
            self.over[queue] = max(self.over.get(queue, 0), event[queue])

    def wait_stream(self, other: Queue) -> None:
        self.wait_event(other.record_event())

    def has_waited_for(self, queue: Queue, number: int) -> bool:
        return queue is self or self.over.get(queue, 0) >= number


class Device:
    """Stands for `torch.cuda` and its allocator, which hands out the memory that was freed last, at once."""

    def __init__(self) -> None:
        self.compute = self.current = Queue()
        self.uses: list[dict[Queue, int]] = []  # by block of memory: the last operation of each stream that used it
        self.free: list[int] = []
        self.log: list[str] = []

    def Stream(self, device: torch.device) -> Queue:
        return Queue()

    def current_stream(self) -> Queue:
        return self.current

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        self.current = queue
        yield
        self.current = self.compute

    def allocate(self, on_host: bool = False) -> int:
        if self.free and not on_host:
            return self.free.pop()
        self.uses.append({})
        return len(self.uses) - 1

    def use(self, *blocks: int) -> None:
        """Queue an operation on blocks, on the current stream."""
        for block in blocks:
            for queue, number in self.uses[block].items():
                assert self.current.has_waited_for(queue, number), f"block {block} is used too early: {self.log}"
        self.current.number += 1
        for block in blocks:
            self.uses[block][self.current] = self.current.number


class Memory:
    """Stands for a tensor, and for its storage."""

    nbytes, shape, dtype = 8, (2,), torch.float32

    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name, self.block = device, name, device.allocate(name == "host")

    def numel(self) -> int:
        return 2

    def untyped_storage(self) -> Memory:
        return self

    def copy_(self, source: Memory, non_blocking: bool) -> None:
        assert non_blocking
        self.device.use(source.block, self.block)
        self.device.log.append(f"{source.name} to {self.name}")


@pytest.mark.parametrize(("micro_batches", "warm_up"), [(8, 6), (20, 3), (4, 3), (12, 11)])
def test_the_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch, micro_batches: int, warm_up: int) -> None:
    """Whoever uses memory, of the device or of the host, has waited for all that used it before, also as the memory of something else.
    Copies out run beside the pass that follows, copies back beside the backward pass before."""
    device, hosts = Device(), list[Memory]()

    def host_memory(*_: Any, pin_memory: bool, **options: Any) -> Memory:
        assert pin_memory
        host = Memory(device, "host")
        hosts.append(host)
        return host

    def resize(storage: Memory, nbytes: int) -> None:
        device.log.append(f"{storage.name} {'comes' if nbytes else 'goes'}")
        if nbytes:
            storage.block = device.allocate()
        else:
            device.free.append(storage.block)

    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(torch, "empty", host_memory)
    monkeypatch.setattr(waiting_histories, "resize", resize)
    waiting = WaitingHistories(torch.device("cuda"))
    waiting.begin_step(warm_up + 1)
    histories: list[Memory] = []

    def forward() -> None:
        histories.append(Memory(device, str(len(histories))))
        device.use(histories[-1].block)
        device.log.append(f"F{histories[-1].name}")
        waiting.after_forward(len(histories) - 1, histories[-1])  # type: ignore[arg-type]  # stands for a tensor

    def backward(index: int) -> None:
        waiting.before_backward()
        device.log.append(f"B{index}")
        other = device.allocate()  # of the backward pass itself
        device.use(histories[index].block, other)
        waiting.after_backward()
        device.free += [histories[index].block, other]

    for _ in range(warm_up):
        forward()
    for index in range(micro_batches):
        if len(histories) < micro_batches:
            forward()
        backward(index)
    log = device.log
    for index in range(2, micro_batches):
        left, goes = log.index(f"{index} to host"), log.index(f"{index} goes")
        assert log[left - 1] in (f"F{index}", f"{index - 1} goes")
        assert [word for word in log[left:goes] if word[0] in "FB"] == [
            f"F{index + 1}" if index < warm_up else f"B{index - warm_up}"
        ]
        came = log.index(f"host to {index}", goes)
        assert log.index(f"B{index - 2}") < log.index(f"{index} comes") < came < log.index(f"B{index - 1}")
    assert len(hosts) == host_buffers(warm_up + 1, micro_batches)
