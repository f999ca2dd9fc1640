"""Note the kernels that the decoder layers of a model start in one step, with their bytes, FLOPs and time by roofline on a named GPU.

The layers run with real shapes on torch's meta device, which computes nothing. Every operation is one kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lime_dist.config.schema import ModelConfig
from lime_dist.model import layers as layers_module
from lime_dist.model.architecture import architecture_of, stage_layout
from lime_dist.model.decoder import decoder_layers, open_history, run_layers

PARTS = ("products", "attention", "elementwise", "history")
HISTORY_FILES = ("history.py", "token_slices.py", "products.py", "kv/functions.py", "hidden/functions.py")
"""Ends of the paths in `lime_dist.model` of the files whose operations belong to the layer history."""


@dataclass(frozen=True)
class Gpu:
    """Bytes per second of its memory; FLOP/s of products of bf16 factors, and of float32 factors without tensor cores."""

    bandwidth: float
    bf16_flops: float
    fp32_flops: float


GPUS = {
    "h100": Gpu(3.35e12, 800e12, 60e12),
    "h200": Gpu(4.8e12, 800e12, 60e12),
    "a100": Gpu(2.0e12, 280e12, 19.5e12),
}


@dataclass(frozen=True)
class Kernel:
    """One operation: its name, the part of the layer that it belongs to, bytes read and written, FLOPs, type of factors."""

    name: str
    part: str
    nbytes: int
    flops: float
    dtype: torch.dtype

    def seconds(self, gpu: Gpu) -> float:
        rate = gpu.bf16_flops if self.dtype.itemsize == 2 else gpu.fp32_flops
        return max(self.nbytes / gpu.bandwidth, self.flops / rate)


def step_kernels(
    config: ModelConfig, batch: int, length: int, dtype: torch.dtype, activation_checkpointing: bool
) -> list[Kernel]:
    """The kernels of one forward and backward pass of all decoder layers over one micro-batch."""
    meta = torch.device("meta")
    with meta:
        layers = [spec.make().to(dtype) for spec in decoder_layers(config)[1:-2]]
    hidden = torch.empty(
        batch, length, *architecture_of(config).hidden_shape, dtype=dtype, device=meta, requires_grad=True
    )
    history = open_history(config, stage_layout(config, range(config.num_hidden_layers)), batch * length, dtype, meta)
    with Trace() as trace, OneKernelEach(trace), mock.patch.object(layers_module, "rms_norm", norm_on_cuda):
        out, _ = run_layers(layers, hidden, history, activation_checkpointing)
        del history
        out.backward(torch.empty_like(out))
    return trace.kernels


FREE = frozenset(
    "alias as_strided detach diagonal empty empty_like empty_strided expand new_empty new_empty_strided permute select set_ slice "
    "split split_with_sizes squeeze t transpose unbind unfold unsqueeze view _reshape_alias _unsafe_view lift_fresh".split()
)
"""Operations that start no kernel."""
FILLS = frozenset(
    "arange eye fill_ full full_like new_zeros ones ones_like scalar_tensor zero_ zeros zeros_like".split()
)
"""Operations that only write."""


class Trace(TorchDispatchMode):
    """Notes every operation that starts a kernel while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def note(self, name: str, reads: Iterable[Tensor], writes: Iterable[Tensor], flops: float = 0) -> None:
        """Note a kernel that reads and writes these tensors."""
        inputs, outputs = list(reads), list(writes)
        factors = inputs[0 if "attention" in name else -1].dtype if flops else torch.float32
        nbytes = sum(map(touched_bytes, inputs)) + sum(map(touched_bytes, outputs))
        self.kernels.append(Kernel(name, part_of(name, flops), nbytes, flops, factors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in FREE:
            return result
        given = {key: value for key, value in kwargs.items() if key != "out"}
        inputs = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in FILLS:
            inputs = []
        elif name == "copy_":
            inputs = inputs[1:]  # what the target held is not read
        elif name in ("slice_backward", "select_backward"):
            self.note("zeros", [], outputs)
            outputs = inputs
        self.note(name, inputs, outputs, product_flops(name, inputs))
        return result


def product_flops(name: str, inputs: Sequence[Tensor]) -> float:
    """FLOPs of a matrix product or of causal attention, 0 for everything else."""
    if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
        left, right = inputs[-2:]
        return 2.0 * left.numel() * right.shape[-1]
    if "flash_attention" in name:  # the mask leaves half of the pairs; backward computes the scores again
        q_BHTd = next(tensor for tensor in inputs if tensor.dim() == 4)
        return 2.0 * q_BHTd.numel() * q_BHTd.shape[2] * (2.5 if "backward" in name else 1)
    return 0.0


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor; what is expanded is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def part_of(name: str, flops: float) -> str:
    """The part of the layer that the running operation belongs to."""
    if in_history():
        return "history"
    if "attention" in name:
        return "attention"
    return "products" if flops else "elementwise"


def in_history() -> bool:
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        path = caller.f_code.co_filename
        if path.endswith(HISTORY_FILES) and "lime_dist/model/" in path:
            return True
        frame = caller
    return False


def norm_on_cuda(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What the model calls for an RMSNorm on CUDA."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


class OneKernelEach(TorchFunctionMode):
    """Takes the model's path for CUDA, with attention and RMSNorm as one operation each way, which the meta device would take apart."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q_BHTd, k_BHTd, v_BHTd = args
            return torch.ops.aten._scaled_dot_product_flash_attention(q_BHTd, k_BHTd, v_BHTd, 0.0, True)[0]
        if getattr(getattr(func, "__self__", None), "__name__", "") == "is_cuda":
            return True
        if func is torch.nn.functional.rms_norm:
            return OneKernelNorm.apply(args[0], kwargs["weight"], self._trace)
        return func(*args, **kwargs)


class OneKernelNorm(torch.autograd.Function):
    """The operations and the memory of a fused RMSNorm, without its numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, trace: Trace) -> Tensor:
        root = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.trace = trace
        ctx.save_for_backward(x, weight, root)
        out = torch.empty_like(x)
        trace.note("rms_norm", [x] if weight is None else [x, weight], [out, root])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, root = ctx.saved_tensors
        result = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
        present = [tensor for tensor in (x, weight, root, *gradients) if tensor is not None]
        ctx.trace.note("rms_norm_backward", present, [tensor for tensor in result if tensor is not None])
        return *result, None
