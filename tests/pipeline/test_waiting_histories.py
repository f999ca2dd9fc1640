"""Protects histories that wait on the host: nothing that is computed changes, as little as planned lies on the device, and copies and
passes come in an order in which none reads what another has not written."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pipeline.test_equality import ROUTES, check_equal, policy_settings, settings
from support.policies import POLICIES
from support.workers import WorkerGroup

from lime_dist import load_config
from lime_dist.errors import LimeError
from lime_dist.model.architecture import architecture_of
from lime_dist.model.history import LayerHistory
from lime_dist.pipeline import waiting_histories
from lime_dist.pipeline.memory import HISTORIES_ON_DEVICE

Workers = Callable[[int], WorkerGroup]


def train_with_nothing_left(values: dict[str, Any], steps: int, evaluation_micro_batch_size: int = 0) -> dict[str, Any]:
    """Worker case: `train_steps` in which memory that a history comes back to holds no number before; also the histories that left in
    a step, and the most that lay on the device."""
    from support.cases import train_steps

    from lime_dist.pipeline.module import LimePipelineModule

    resize, make, left = waiting_histories.resize, LimePipelineModule.new_history, 0
    here: set[int] = set()
    most = 0

    def counting(storage: torch.UntypedStorage, nbytes: int) -> None:
        nonlocal left, most
        resize(storage, nbytes)
        if nbytes:
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)
            here.add(storage._cdata)
            most = max(most, len(here))
        else:
            left += 1
            here.remove(storage._cdata)

    def noting(module: LimePipelineModule, *arguments: Any) -> LayerHistory | None:
        nonlocal most
        history = make(module, *arguments)
        if architecture_of(module.config.model).offloads_history:
            storage = history.memory.untyped_storage()
            here.add(storage._cdata)
            weakref.finalize(history, here.discard, storage._cdata).atexit = False
            most = max(most, len(here))
        return history

    waiting_histories.resize, LimePipelineModule.new_history = counting, noting  # type: ignore[method-assign]  # for this case only
    try:
        result = train_steps(values, steps, evaluation_micro_batch_size)
    finally:
        waiting_histories.resize, LimePipelineModule.new_history = resize, make  # type: ignore[method-assign]  # put back
    result["left"], result["most"] = left / steps, most
    return result


def offloading(values: dict[str, Any], stages: int, **pipeline: Any) -> dict[str, Any]:
    """Eight micro-batches, of which the first stage has seven in flight."""
    values["train"] = {**values["train"], "global_batch_size": 8, "micro_batch_size": 1}
    values["parallel"] = {**values["parallel"], "pipeline_stages": stages, "offload_history": True}
    values["pipeline"] = {"extra_in_flight": 6 // (stages - 1) - 1, **pipeline}
    return values


def check(values: dict[str, Any], group: WorkerGroup, **options: Any) -> None:
    """Results are those of one process, and histories do leave the first stage."""
    first, *_, last = check_equal(values, group, worker=f"{__name__}.train_with_nothing_left", **options)
    assert (first["left"], first["most"], last["left"]) == (6, HISTORIES_ON_DEVICE, 0)


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
    moved = workers(4).run("support.cases.train_steps", values=values, steps=3)
    values["parallel"]["offload_history"] = False
    for one, other in zip(moved, workers(4).run("support.cases.train_steps", values=values, steps=3), strict=True):
        assert one["losses"] == other["losses"] and one["norms"] == other["norms"]
        assert all(torch.equal(one["parameters"][name], other["parameters"][name]) for name in other["parameters"])


@pytest.mark.parametrize("model", ["llama", "value residual"])
def test_models_whose_history_stays(workers: Workers, model: str) -> None:
    first, _ = check_equal(
        offloading(settings(model, 4, True, "fp64"), 2), workers(2), 2, worker=f"{__name__}.train_with_nothing_left"
    )
    assert first["left"] == 0


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 5])
def test_few_micro_batches(workers: Workers, micro_batches: int) -> None:
    """With up to three nothing leaves."""
    values = offloading(policy_settings("static", "full", "fp64"), 2)
    values["train"]["global_batch_size"] = micro_batches
    first, _ = check_equal(values, workers(2), 2, 1, worker=f"{__name__}.train_with_nothing_left")
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
        self.over = {
            queue: max(self.over.get(queue, 0), event.get(queue, 0)) for queue in {*self.over, *event} - {self}
        }

    def wait_stream(self, other: Queue) -> None:
        self.wait_event(other.record_event())

    def has_waited_for(self, operation: tuple[Queue, int]) -> bool:
        queue, number = operation
        return queue is self or self.over.get(queue, 0) >= number


class Device:
    """Stands for `torch.cuda`."""

    def __init__(self) -> None:
        self.compute = self.current = Queue()

    def Stream(self, device: torch.device) -> Queue:
        self.copies = Queue()
        return self.copies

    def current_stream(self) -> Queue:
        return self.current

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        self.current = queue
        yield
        self.current = self.compute

    def queue(self) -> tuple[Queue, int]:
        self.current.number += 1
        return self.current, self.current.number


@pytest.mark.parametrize(("micro_batches", "warm_up"), [(8, 6), (9, 3), (4, 3), (12, 11)])
def test_the_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch, micro_batches: int, warm_up: int) -> None:
    """Whoever reads has waited for who wrote, and whoever gets memory, on the device or on the host, for who used it before. The copies
    from the device run beside backward passes, and those to it one backward pass ahead."""
    device, used, written, log = Device(), dict[str, Any](), dict[str, Any](), list[str]()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(
        waiting_histories.WaitingHistories, "_host_memory", lambda self, memory: Memory(f"host {memory.name}")
    )

    class Memory:
        def __init__(self, name: str) -> None:
            self.name, self.nbytes = name, 8

        def untyped_storage(self) -> Memory:
            return self

        def copy_(self, source: Memory, non_blocking: bool) -> None:
            assert non_blocking
            touch(source.name, writes=False)
            touch(self.name, writes=True)
            log.append(f"{source.name} to {self.name}")

    def touch(name: str, writes: bool) -> None:
        for before in [written.get(name), *(used.get(name, []) if writes else [])]:
            assert before is None or device.current.has_waited_for(before), f"{name} too early"
        operation = device.queue()
        used.setdefault(name, []).append(operation)
        if writes:
            written[name] = operation

    def resize(storage: Memory, nbytes: int) -> None:
        log.append(f"{storage.name} {'comes' if nbytes else 'goes'}")
        for before in used.get(storage.name, []):
            assert device.compute.has_waited_for(before), f"memory of {storage.name} is taken while it is used"

    monkeypatch.setattr(waiting_histories, "resize", resize)
    waiting = waiting_histories.WaitingHistories(torch.device("cuda"))
    waiting.begin_step(warm_up + 1)

    def forward(index: int) -> None:
        waiting.before_forward()
        touch(str(index), writes=True)
        log.append(f"F{index}")
        waiting.after_forward(index, Memory(str(index)))  # type: ignore[arg-type]  # stands for a tensor

    def backward(index: int) -> None:
        waiting.before_backward()
        log.append(f"B{index}")
        touch(str(index), writes=True)
        waiting.after_backward()

    for index in range(warm_up):
        forward(index)
    for index in range(micro_batches - warm_up):
        forward(warm_up + index)
        backward(index)
    for index in range(micro_batches - warm_up, micro_batches):
        backward(index)
    for index in range(2, micro_batches):
        left, came = log.index(f"{index} to host {index}"), log.index(f"host {index} to {index}")
        assert log.index(f"F{index}") < left < log.index(f"{index} goes") < log.index(f"{index} comes") < came
        assert log.index(f"B{index - 2}") < came < log.index(f"B{index - 1}") < log.index(f"B{index}")
