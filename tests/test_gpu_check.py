"""Protects the check of GPUs: its whole path runs on a CPU, and it sees what is wrong.

A section that fails, hangs or lacks something is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lime_dist.config.registry import ARCHITECTURES
from lime_dist.config.sections.model import HISTORY_KEYS
from lime_dist.errors import LimeError

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.slow
def test_the_whole_path_on_a_cpu(tmp_path: Path) -> None:
    """Every section passes or says that it needs GPUs. A second call measures nothing again."""
    command = ["bash", str(ROOT / "launch/gpu_check.sh"), "--python", sys.executable, "--output", str(tmp_path / "out")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
        for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr
    table = (tmp_path / "out/table.md").read_text()
    assert table in first.stdout and table in second.stdout
    assert table.startswith("## On ") and "sizes small" in table
    for section in ("Two processes on two GPUs over NCCL equal the CPU", "Compiled layers equal the CPU"):
        assert f"| {section} | left out | no GPU | 0 |" in table
    assert table.count("| passed |") == second.stdout.count("already measured") == 6
    for row in (
        "lime chunked, checkpointed | bf16",
        "lime chunked, two replicas, ZeRO-1 | fp32",
        "lime_64_2x8 | 8 | 2",
    ):
        assert f"| {row} |" in table
    assert "operations (no GPU, so no kernels) a layer" in table


# -- sections that go wrong ---------------------------------------------------------------------------------------------

STUB = """
import json, os, sys, time
from pathlib import Path
name, output, machine = sys.argv[1:]
sys.path.insert(0, {benchmarks!r})
from gpu_check_report import Report
report = Report(Path(output) / f"{{name}}.json", json.loads(machine))
Path(output, f"{{name}}.calls").open("a").write("x")
report.header = ["case", "result"]
report.add("one", "1")
if name == "dies":
    sys.exit("CUDA error: out of memory")
if name == "hangs":
    if not os.fork():
        Path(output, "child").write_text(str(os.getpid()))
    time.sleep(100)
if name == "differs":
    report.problems.append("llama in fp32: losses are off")
report.finish("all is well")
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run the check with sections of ours; returns its status and its table."""
    import gpu_check

    (tmp_path / "gpu_check_section.py").write_text(STUB.format(benchmarks=str(BENCHMARKS)))
    sections = {
        "passes": gpu_check.Section("passes", 60),
        "dies": gpu_check.Section("dies", 60),
        "hangs": gpu_check.Section("hangs", 6),
        "differs": gpu_check.Section("differs", 60),
        "wants": gpu_check.Section("wants two GPUs", 60, gpus=2),
    }
    monkeypatch.setattr(gpu_check, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    monkeypatch.setattr(gpu_check, "machine_facts", lambda: {"device": "A CPU", "DeepSpeed": "0.19.8", "GPUs": "1"})

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as stop:
            gpu_check.main()
        return int(stop.value.code or 0), (tmp_path / "out/table.md").read_text()

    return run


def has_ended(process: int) -> bool:
    """Whether a process ends within some seconds; one that has ended and that nobody has reaped counts."""
    with contextlib.suppress(psutil.NoSuchProcess):
        until = time.monotonic() + 20
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
    return True


def test_a_section_that_goes_wrong_stops_no_other(check: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, table = check()
    assert status == 1
    assert "| passes | passed | all is well |" in table
    assert (
        "| dies | failed | ended with status 1: CUDA error: out of memory (stopped after 1 rows; see dies.log) |"
        in table
    )
    assert "| hangs | failed | stopped after 6 s (stopped after 1 rows; see hangs.log) |" in table
    assert "| differs | failed | llama in fp32: losses are off |" in table
    assert "| wants two GPUs | left out | needs 2 GPUs, and there is 1 |" in table
    assert table.count("| one | 1 |") == 4, "what was measured before it ended"
    child = int((tmp_path / "out/child").read_text())
    assert has_ended(child)


def test_what_passed_is_not_repeated(check: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """What failed is. Another machine's results are not taken, and a damaged file is no result."""

    def calls(name: str) -> int:
        return len((tmp_path / f"out/{name}.calls").read_text())

    names = ("--sections", "passes", "differs")
    assert check(*names)[0] == check(*names)[0] == 1
    assert (calls("passes"), calls("differs")) == (1, 2)
    assert check("--sections", "passes")[0] == 0 and calls("passes") == 1
    assert check("--sections", "passes", "--again")[0] == 0 and calls("passes") == 2
    path = tmp_path / "out/passes.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "machine": {"device": "another"}}))
    assert check("--sections", "passes")[0] == 0 and calls("passes") == 3
    path.write_text("{")
    assert check("--sections", "passes")[0] == 0 and calls("passes") == 4


def test_what_is_missing_is_said() -> None:
    import gpu_check

    machine = {"device": "A CPU", "DeepSpeed": "not installed"}
    lacks = {name: gpu_check.lacks(section, machine) for name, section in gpu_check.SECTIONS.items()}
    assert lacks["step_cost"] == "" and lacks["equality"].startswith("DeepSpeed is not installed; pip install")
    command = [sys.executable, "-S", str(BENCHMARKS / "gpu_check.py"), "--output", "/nowhere"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # as launch/gpu_check.sh sets it
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 2
    assert (
        finished.stderr
        == "error: torch, numpy, packaging, pydantic, pyyaml not installed; pip install -c constraints.txt -e .\n"
    )


# -- what the sections see ------------------------------------------------------------------------------------------------


def test_every_architecture_and_policy_is_checked() -> None:
    from gpu_check_machine import FULL
    from gpu_check_models import compared

    models = [compared(name, FULL.equality).model for name in FULL.models]
    assert {model.architecture for model in models} == set(ARCHITECTURES)
    for routes in ("kv", "hidden"):
        policies = {m.lime.history.policy for m in models if m.architecture == "lime" and m.lime.routes == routes}
        assert policies == set(HISTORY_KEYS)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a wrong sign": lambda tensor: -tensor,
    "TF32": lambda tensor: tensor * (1 + 5e-4 * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)),
    "nan": lambda tensor: tensor * float("nan"),
}


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    """A comparison, and what the CPU computes."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from equality import train_one_process
        from gpu_check_errors import EVALUATION_MICRO_BATCH_SIZE, STEPS, Comparison
        from gpu_check_machine import SMALL
        from gpu_check_models import compared
    finally:
        sys.path.remove(str(BENCHMARKS))
    config = compared("lime chunked", SMALL.equality)
    return Comparison(config), train_one_process(config, STEPS, EVALUATION_MICRO_BATCH_SIZE)


def test_the_same_numbers_are_equal(trained: tuple[Any, Any]) -> None:
    comparison, result = trained
    cells, problems = comparison.check([result])
    assert not problems and len(cells) == 6


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("kind", ["gradients", "updates"])
def test_another_tensor_is_seen(trained: tuple[Any, Any], change: str, kind: str) -> None:
    comparison, result = trained
    name = "model.layers.2.self_attn.router.weight"
    wrong = {**result, kind: {**result[kind], name: CHANGES[change](result[kind][name])}}
    (problem,) = comparison.check([wrong])[1]
    assert problem.startswith(f"{kind} of model.layers.*.self_attn.router.weight are off by ")


def test_another_loss_is_seen(trained: tuple[Any, Any]) -> None:
    comparison, result = trained
    (problem,) = comparison.check([{**result, "losses": [*result["losses"][:-1], 1.001 * result["losses"][-1]]}])[1]
    assert problem.startswith("losses are off by 1.0e-03")


def test_a_parameter_that_no_rank_has_is_seen(trained: tuple[Any, Any]) -> None:
    comparison, result = trained
    fewer = {name: gradient for name, gradient in result["gradients"].items() if name != "model.norm.weight"}
    (problem,) = comparison.check([{**result, "gradients": fewer}])[1]
    assert problem == "1 parameters were not compared, such as model.norm.weight"


def test_reading_a_trace() -> None:
    """Kernels on two streams, one wait in the middle, a copy that is not pinned, and the wait at the end, which is ours."""
    from gpu_check_trace import read_trace

    def event(category: str, name: str, begin: float, duration: float) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration}

    events = [
        {"ph": "M", "name": "process_name", "args": {}},
        event("cpu_op", "aten::mm", 0, 5),
        event("kernel", "gemm", 10, 10),
        event("kernel", "norm", 15, 10),
        event("cuda_runtime", "cudaStreamSynchronize", 26, 4),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 40, 5),
        event("gpu_memset", "Memset (Device)", 45, 5),
        event("cuda_runtime", "cudaDeviceSynchronize", 47, 10),
    ]
    trace = read_trace(events, of_gpu=True)
    assert (trace.launches, trace.waits, trace.pageable) == (4, 1, 1)
    assert trace.busy == pytest.approx(25 / 40)
    assert read_trace(events, of_gpu=False).launches == 1
    assert read_trace([], of_gpu=True).launches == 0


def test_a_cluster_configuration_is_cut_to_the_memory() -> None:
    """First to fewer samples, then to fewer layers; the plan of what is left fits."""
    from gpu_check_cluster import CONFIGS, SHARE, cut
    from gpu_check_engine import planned_bytes
    from gpu_check_machine import FULL

    path = CONFIGS / "lime_64_2x8.yaml"
    sizes = []
    for memory in (80e9, 24e9, 12e9):
        config = cut(path, FULL, int(memory))
        assert planned_bytes(config) <= SHARE * memory and config.parallel.pipeline_stages == 1
        sizes.append((config.train.micro_batch_size, config.model.num_hidden_layers))
    assert sizes[0] == (2, 8) and sizes == sorted(sizes, reverse=True) and sizes[2][1] < 8
    with pytest.raises(LimeError, match="lime_64_2x8.yaml: not even one layer with one sample fits into 1.0 GB"):
        cut(path, FULL, 10**9)
