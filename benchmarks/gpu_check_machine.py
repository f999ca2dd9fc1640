"""The machine that `gpu_check.py` runs on: its device, versions, and the sizes that the sections use there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_check_models import MODELS

from lime_dist.versions import installed_version

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured.

    Attributes:
        models: names in `gpu_check_models`.
        equality: the model whose results are compared, as overrides.
        pipeline: the same for two processes.
        shape: of the model in `memory` and `kernels`.
        step_cost: options of `step_cost.py`.
        cluster: overrides of configs/cluster; its layers are those of one stage.
        cluster_micro_batches: in a step.
        steps: that are timed.
    """

    models: list[str]
    equality: list[str]
    pipeline: list[str]
    shape: list[str]
    step_cost: list[str]
    cluster: list[str]
    cluster_micro_batches: int
    steps: int


def _model(**keys: int) -> list[str]:
    return [f"{'data' if key == 'sequence_length' else 'model'}.{key}={value}" for key, value in keys.items()]


FULL = Sizes(
    models=list(MODELS),
    equality=_model(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, sequence_length=32,
    ),
    pipeline=_model(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sequence_length=32,
    ),
    shape=_model(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8,
        sequence_length=1024,
    ),
    step_cost=[
        "--layers", "20", "--kv-heads", "16", "4", "--hidden", "2048", "--heads", "16", "--vocabulary", "8192",
        "--length", "2048", "--repeats", "3", "--dtype", "bf16", "--variants", "full", "first_last", "chunked",
    ],
    cluster=[],
    cluster_micro_batches=8,
    steps=4,
)  # fmt: skip
"""For GPUs."""

SMALL = Sizes(
    models=["llama", "lime chunked", "hidden first_last", "hyper dynamic"],
    equality=_model(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, sequence_length=8,
    ),
    pipeline=_model(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sequence_length=8,
    ),
    shape=_model(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4,
        sequence_length=64,
    ),
    step_cost=[
        "--layers", "4", "--kv-heads", "4", "--hidden", "32", "--heads", "4", "--vocabulary", "64", "--length", "32",
        "--batch", "2", "--repeats", "1", "--variants", "full", "chunked",
    ],
    cluster=_model(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, sequence_length=32,
    ),
    cluster_micro_batches=2,
    steps=2,
)  # fmt: skip
"""To run the whole path on a CPU."""


def on_gpu() -> bool:
    """Whether the processes of the check use GPUs."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def memory_at_hand() -> int:
    """Bytes of memory that the device has free."""
    if on_gpu():
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def synchronise() -> None:
    """Wait until the device has done what is queued."""
    if on_gpu():
        torch.cuda.synchronize()


def exact_float32() -> None:
    """Compute float32 products in float32: no TF32, whatever the environment of the shell asks for."""
    torch.set_float32_matmul_precision("highest")


def machine_facts() -> dict[str, str]:
    """The device's name, memory and number, and versions: what a result depends on."""
    facts = {"device": _cpu_name(), "cores": str(len(os.sched_getaffinity(0)))}
    if on_gpu():
        properties = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(index) for index in range(count)]
        kinds = {name: names.count(name) for name in names}
        facts["device"] = ", ".join(f"{number} × {name}" if count > 1 else name for name, number in kinds.items())
        facts["GPUs"] = str(count)
        facts["memory"] = f"{properties.total_memory / 1e9:.1f} GB"
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["CUDA"] = str(torch.version.cuda)
        if torch.distributed.is_nccl_available():
            facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    facts["Python"] = platform.python_version()
    facts["torch"] = torch.__version__
    facts["DeepSpeed"] = installed_version("deepspeed")
    facts["commit"] = _commit()
    return {name: value or "unknown" for name, value in facts.items()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with a hash of what differs from it."""
    commit = _said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changes = _said("git", "-C", str(ROOT), "diff", "HEAD")
    return f"{commit} with changes {hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else commit


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":  # in a process of its own, so that the one that waits for the sections holds no GPU
    print(json.dumps(machine_facts()))
