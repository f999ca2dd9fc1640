"""Estimate by roofline what a decoder layer's training step costs on a GPU, by architecture, history policy, depth and K/V heads.

No GPU is needed. The decoder layers run forward and backward with real shapes on torch's meta device, which computes nothing. Every
operation that really runs is one kernel. It takes as long as its bytes take at the GPU's memory bandwidth, or its FLOPs at the
rate of its type, whichever is longer; starting it takes no time. Attention and RMSNorm are one kernel each, as on a GPU. Embedding,
output projection, loss and optimizer are left out. These are lower bounds to compare variants by, not measurements.

examples:
  python benchmarks/roofline.py --output runs/roofline
  python benchmarks/roofline.py --output runs/roofline_full --layers 64 --kv-heads 16 --variants full chunked-8
  python benchmarks/roofline.py --output runs/roofline_paper --configs configs/paper/*.yaml
  python benchmarks/roofline.py --output runs/roofline_a100 --gpu a100 --layers 32
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from results import write
from step_cost import DTYPES
from step_cost import VARIANTS as MEASURED
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lime_dist import load_config
from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError, run_command
from lime_dist.model.architecture import BASELINE, architecture_of, stage_layout
from lime_dist.model.decoder import decoder_layers, open_history, run_layers
from lime_dist.paths import user_path

VARIANTS: dict[str, list[str]] = {
    **{name: overrides for name, overrides in MEASURED.items() if name != "copying"},
    "chunked-8": ["model.lime.history={policy: chunked, chunk_size: 8, rank: 2, first: 2}"],
    "hidden-dynamic": ["model.lime.routes=hidden", "model.lime.router=dynamic"],
}
DEFAULT = ["llama", "first_last", "chunked-8", "full"]
PARTS = ("products", "attention", "elementwise", "history")
HISTORY_FILES = ("history.py", "token_slices.py", "functions.py", "products.py")
"""Names of the files of `lime_dist.model` whose operations belong to the layer history."""


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--layers", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=list(VARIANTS), metavar="VARIANT",
                        help=f"of {', '.join(VARIANTS)}; llama always runs")  # fmt: skip
    parser.add_argument("--configs", nargs="+", type=user_path, metavar="FILE",
                        help="the models of these configurations instead; ratios are to the first with model.architecture: llama")  # fmt: skip
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size; the SwiGLU has four times as much")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument(
        "--checkpointing", action="store_true", help="keep only each layer's input for the backward pass"
    )
    parser.add_argument("--operations", type=int, default=0, metavar="COUNT",
                        help="also list the COUNT longest operations of every variant")  # fmt: skip
    arguments = parser.parse_args()
    arguments.variants = [name for name in VARIANTS if name in {BASELINE, *arguments.variants}]
    return arguments


def main() -> None:
    arguments = parse()
    for name in ("batch", "length"):
        if getattr(arguments, name) < 1:
            raise LimeError(f"--{name} {getattr(arguments, name)} must be at least 1")
    groups = config_groups(arguments) if arguments.configs else variant_groups(arguments)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LimeError(f"--output {arguments.output}: {error.strerror}; give another folder") from None
    results: dict[str, dict[str, Estimate]] = {}
    for group, configs in groups.items():
        results[group] = {}
        for name, config in configs.items():
            print(f"{group}: {name}", file=sys.stderr, flush=True)
            kernels = step_kernels(
                config, arguments.batch, arguments.length, DTYPES[arguments.dtype], arguments.checkpointing
            )
            results[group][name] = estimate(kernels, GPUS[arguments.gpu], config.num_hidden_layers)
    table = make_table(results, arguments.operations)
    write(arguments.output / "table.md", table)
    print(table)


Groups = dict[str, dict[str, ModelConfig]]
"""Models that are compared with one LLaMA, by name of the group and name of the variant."""


def variant_groups(arguments: argparse.Namespace) -> Groups:
    groups: Groups = {}
    for layers in arguments.layers:
        for kv_heads in arguments.kv_heads:
            configs = groups.setdefault(f"{layers} layers, G {kv_heads}", {})
            for name in arguments.variants:
                if "model.lime.routes=hidden" in VARIANTS[name] and kv_heads != arguments.heads:
                    continue  # hidden routes need as many K/V heads as query heads
                shape = {
                    "vocab_size": 1024, "hidden_size": arguments.hidden, "intermediate_size": 4 * arguments.hidden,
                    "num_hidden_layers": layers, "num_attention_heads": arguments.heads, "num_key_value_heads": kv_heads,
                }  # fmt: skip
                overrides = [*(f"model.{key}={value}" for key, value in shape.items()), *VARIANTS[name]]
                configs[name] = load_config(None, overrides).model
    return groups


def config_groups(arguments: argparse.Namespace) -> Groups:
    configs = {path.stem: load_config(path, []).model for path in arguments.configs}
    names = sorted(configs, key=lambda name: configs[name].architecture != BASELINE)
    if configs[names[0]].architecture != BASELINE:
        raise LimeError("--configs needs a configuration with model.architecture: llama, to compare the others with")
    return {"configurations": {name: configs[name] for name in names}}


# -- what runs ------------------------------------------------------------------------------------------------------------


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
    history = open_history(config, stage_layout(config, 0, config.num_hidden_layers), batch * length, dtype, meta)
    with Trace() as trace, OneKernelEach(trace):
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


class OneKernelEach(TorchFunctionMode):
    """Runs attention and RMSNorm as one operation each way, which the meta device would take apart."""

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


# -- the table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Per layer: seconds by part and by operation of a part, bytes and kernels."""

    seconds: dict[str, float]
    operations: dict[tuple[str, str], float]
    nbytes: float
    kernels: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def estimate(kernels: Sequence[Kernel], gpu: Gpu, layers: int) -> Estimate:
    seconds = dict.fromkeys(PARTS, 0.0)
    operations: defaultdict[tuple[str, str], float] = defaultdict(float)
    for kernel in kernels:
        seconds[kernel.part] += kernel.seconds(gpu) / layers
        operations[kernel.part, kernel.name] += kernel.seconds(gpu) / layers
    return Estimate(seconds, operations, sum(kernel.nbytes for kernel in kernels) / layers, len(kernels) / layers)


def make_table(groups: dict[str, dict[str, Estimate]], num_operations: int) -> str:
    """Milliseconds a layer by part, and ratios to LLaMA's total."""
    lines = [f"| | {' | '.join(PARTS)} | ms a layer | over LLaMA | GB a layer | kernels a layer |", "|---" * 9 + "|"]
    listed: list[str] = []
    for group, estimates in groups.items():
        base = next(iter(estimates.values())).total
        for name, result in estimates.items():
            parts = " | ".join(f"{1e3 * result.seconds[part]:.2f}" for part in PARTS)
            ratio = "" if result.total == base else f"{result.total / base - 1:+.1%}"
            lines.append(
                f"| {group}: {name} | {parts} | {1e3 * result.total:.2f} | {ratio} | {result.nbytes / 1e9:.1f} | "
                f"{result.kernels:.0f} |"
            )
            longest = sorted(result.operations.items(), key=lambda item: -item[1])
            for (part, operation), seconds in longest[:num_operations]:
                listed.append(f"{group}: {name}: {part}, {operation}: {1e6 * seconds:.0f} us a layer")
    return "\n".join([*lines, *([""] if listed else []), *listed]) + "\n"


if __name__ == "__main__":
    run_command(main)
