"""A GPU that computes nothing: tensors on it have shapes, types and bytes, and what a real one would do to the host is recorded.

torch takes it for an accelerator, so that the program goes the way that it goes on CUDA: nothing is compiled, the device is torch's
PrivateUse1 in Python, its tensors are `FakeTensor`, and its process groups torch's ``fake`` ones, in which a single process plays
any rank. Tensors on the CPU stay real. A value that is read from the device is 1.

As on CUDA, an operation whose tensors lie on different devices raises an error (numbers, tensors without dimensions, may lie on the
CPU). The host waits where it reads a value, where it copies from the device, or to it from memory that is not pinned, where it
synchronises, and in a barrier.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "fakegpu"
DEVICE = f"{NAME}:0"
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "lime_dist"
aten = torch.ops.aten


class Wait(NamedTuple):
    """The host waited for the device.

    Attributes:
        what: why it waited.
        where: file and function of the program.
    """

    what: str
    where: str


class FakeGpu(TorchDispatchMode):
    """The device of this process, while the context lasts.

    Attributes:
        waits: of the host, in order.
        queued: number of operations that were queued since the last wait.
        live, peak: bytes of tensors that are alive on the device, and the most there have been.
        moved: bytes copied back to the device for histories.
    """

    active: FakeGpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.queued = self.live = self.peak = self.moved = 0
        self._counted: set[int] = set()

    def reset(self) -> None:
        """Forget waits and the peak."""
        self.waits, self.queued, self.peak, self.moved = [], 0, self.live, 0

    def wait(self, what: str) -> None:
        self.waits.append(Wait(what, _place()))
        self.queued = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if _is_here(args[0]) else func(*args)
        kwargs = kwargs or {}
        tensors = list(_tensors_in(args, kwargs))
        if func is torch.ops.c10d.barrier.default:
            self.wait("barrier")
        if not any(map(_is_here, tensors)) and not _names_device(kwargs.get("device")):
            if kwargs.pop("pin_memory", False):
                self.wait("allocate pinned memory")
                return _pinned_from_now_on(func(*args, **kwargs))
            return func(*args, **kwargs)
        if func is aten.silu_backward.default:  # torch's own shape function takes it apart
            func, args = aten.empty_like.default, args[1:]
        if _is_composite(func):  # its parts come here one by one
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.wait("read")
            return torch.ones((), dtype=args[0].dtype).item()
        if func in (aten._to_copy.default, aten.copy_.default) and (
            copied := self._between_devices(func, args, kwargs)
        ):
            return copied[0]
        _refuse_mixed_devices(func, tensors)
        try:
            with _tensors:
                _tensors.cache_enabled = func is not aten.set_.source_Storage  # the cache would keep the storage
                if not all(map(_is_here, tensors)):
                    args, kwargs = tree_map(_shape_only, (args, kwargs))
                result = func(*args, **kwargs)
        except Exception:
            traceback.print_exc()  # an error in backward ends the process before anything else can print it
            raise
        self._count(func, result)
        return result

    def _between_devices(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor] | None:
        """Copy from or to the CPU; None if both ends are here."""
        in_place = func is aten.copy_.default
        source, target = (args[1] if in_place else args[0]), (args[0] if in_place else None)
        to = target.device if target is not None else torch.device(kwargs.get("device") or source.device)
        blocking = not (kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2]))
        if _is_here(source) and to.type == "cpu":
            if blocking or (target is not None and not target.is_pinned()):
                self.wait("copy to the host")
            if target is None:
                target = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return (target.fill_(1),)
        if source.device.type == "cpu" and to.type == NAME:
            if blocking or not source.is_pinned():
                self.wait("copy from pageable memory")
            with _tensors:
                result = func(*map(_shape_only, args), **kwargs)
            self._count(func, result)
            return (result,)
        return None

    def _count(self, func: Any, result: Any) -> None:
        results = result if isinstance(result, tuple | list) else (result,)
        made = [self._add(tensor) for tensor in _tensors_in(results, {}) if _is_here(tensor)]
        if any(made) or func._schema.is_mutable or func.namespace == "c10d":
            self.queued += 1

    def _add(self, tensor: Tensor) -> bool:
        """Count a tensor's storage, once for all its views; returns whether it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return False
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size).atexit = False
        return True

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Count a storage that gets memory, or loses it. When it dies it has as much as when it was made."""
        self.moved += nbytes
        self.live += nbytes - storage.nbytes()
        self.peak = max(self.peak, self.live)
        storage.resize_(nbytes)

    def _drop(self, key: int, size: int) -> None:
        self._counted.remove(key)
        self.live -= size


def _is_here(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors_in(value, {})


def _shape_only(value: Any) -> Any:
    """What stands for a tensor of another device: its values are not needed."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _names_device(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == NAME


@cache
def _is_composite(func: Any) -> bool:
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _place() -> str:
    """File and function of the program that are running; the file of this test if the program is not."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PROGRAM)]
    return f"{Path(frames[-1].filename).relative_to(PROGRAM)}: {frames[-1].name}" if frames else "a test"


def _refuse_mixed_devices(func: Any, tensors: list[Tensor]) -> None:
    others = {str(tensor.device) for tensor in tensors if not _is_here(tensor) and tensor.ndim and tensor.numel()}
    if others and any(map(_is_here, tensors)):
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on {', '.join(sorted(others))}, in {_place()}")


_math_attention = F.scaled_dot_product_attention


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Takes the kernels of causal attention that CUDA would: flash attention for types of 16 bits, else the memory-efficient one."""
    causal, mask = options.get("is_causal", False), options.pop("attn_mask", mask)
    if not _is_here(query) or not causal or mask is not None:
        return _math_attention(query, key, value, mask, **options)
    if query.dtype.itemsize == 2:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    if query.shape[1] != key.shape[1]:  # that kernel needs as many K/V heads as query heads
        return _math_attention(query, key, value, **options)
    return aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True)[0]


# -- what torch asks of a device's module -------------------------------------------------------------------------------


class Event:
    """Always done, since no time passes on the device."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("synchronise")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        assert self.enable_timing and end.enable_timing
        return 1.0


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def wait_event(self, event: Event) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("synchronise")


def _wait(what: str) -> None:
    if FakeGpu.active is not None:
        FakeGpu.active.wait(what)


class Module:
    """`torch.fakegpu`, as `torch.get_device_module` returns it."""

    Event, Stream = Event, Stream
    _stream = Stream()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def device(self, device: Any) -> Any:
        return nullcontext()

    def current_stream(self, device: Any = None) -> Stream:
        return self._stream

    def default_stream(self, device: Any = None) -> Stream:
        return self._stream

    def stream(self, stream: Stream) -> Any:
        return nullcontext()

    def synchronize(self, device: Any = None) -> None:
        _wait("synchronise")

    def empty_cache(self) -> None: ...

    def memory_allocated(self, device: Any = None) -> int:
        return FakeGpu.active.live if FakeGpu.active is not None else 0

    def max_memory_allocated(self, device: Any = None) -> int:
        return FakeGpu.active.peak if FakeGpu.active is not None else 0


# -- installation -------------------------------------------------------------------------------------------------------

_pinned: set[int] = set()
_tensors = FakeTensorMode()
"""One for the process: the program keeps tables between models, and tensors of two modes do not mix."""
_installed = False
_kernels = torch.library.Library("aten", "IMPL")
"""Operations that are one kernel on CUDA and that torch would take apart on a device without a kernel."""


def install() -> None:
    """Make the device known to torch, its process groups and DeepSpeed, for the rest of this process."""
    global _installed
    if _installed:
        return
    _installed = True
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    _kernels.impl("silu_backward", lambda gradient, x: torch.empty_like(x), "PrivateUse1")
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    FakeTensor.data_ptr = lambda tensor: tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize
    FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()
    dist.Backend.backend_capability["fake"].append(NAME)
    if dist.is_initialized():
        dist.destroy_process_group()
    new_group = dist.distributed_c10d.new_group  # `dist.new_group` belongs to the worker, which knows other groups only
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})
    dist.all_gather_object, dist.gather_object = _all_gather_object, _gather_object
    Tensor.pin_memory = _pin_memory
    F.scaled_dot_product_attention = _attention
    Tensor.is_pinned = lambda tensor, device=None: tensor.untyped_storage()._cdata in _pinned
    to = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *args, **kwargs: (
        module if _is_there(module, *args) else to(module, *args, **kwargs)
    )
    _set_accelerator()


def _set_accelerator() -> None:
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):
        def device_name(self, device_index: int | None = None) -> str:
            return NAME if device_index is None else DEVICE

        def device(self, device_index: int | None = None) -> torch.device:
            return torch.device(DEVICE)

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return DEVICE

        def is_synchronized_device(self) -> bool:
            return False

        def communication_backend_name(self) -> str:
            return "fake"

    set_accelerator(Accelerator())


def _all_gather_object(gathered: list[Any], own: Any, group: Any = None) -> None:
    """All ranks have the same."""
    _wait("all_gather_object")
    gathered[:] = [own] * len(gathered)


def _gather_object(own: Any, gathered: list[Any] | None = None, dst: int = 0, group: Any = None) -> None:
    """All ranks have the same. (The program gathers over a group of CPUs.)"""
    if gathered is not None:
        gathered[:] = [own] * len(gathered)


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    """A copy that counts as pinned."""
    return _pinned_from_now_on(tensor.clone())


def _pinned_from_now_on(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    _pinned.add(storage._cdata)
    weakref.finalize(storage, _pinned.discard, storage._cdata).atexit = False
    return tensor


def _is_there(module: torch.nn.Module, *arguments: Any) -> bool:
    """Whether `Module.to` has nothing to do. (For fake tensors it fails even then.)"""
    return all(isinstance(p, FakeTensor) for p in module.parameters()) and all(map(_names_device, arguments))


@contextmanager
def playing(rank: int, size: int) -> Iterator[FakeGpu]:
    """Play one rank of a job with a fake GPU per rank."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    install()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    from lime_dist.pipeline import waiting_histories

    gpu, resize = FakeGpu(), waiting_histories.resize
    FakeGpu.active, waiting_histories.resize = gpu, gpu.resize
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=…)` makes its tensor on the CPU and copies it
    try:
        with gpu, torch.autograd.set_multithreading_enabled(False):  # the engine's threads die with a device in Python
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        FakeGpu.active, waiting_histories.resize = None, resize
