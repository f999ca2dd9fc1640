"""Protects the benchmarks: what they compare computes the same, and each runs from its command line to its table."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lime_dist import load_config
from lime_dist.model.cost import layer_flops

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_copying_form_equals_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and all gradients in float64, to 1e-12."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import copying

    assert "check: copying equals full" in copying.check_equality()


def test_the_roofline_counts_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs of products and history equal the formulas; a product's bytes are those of its factors and its result."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernels

    config = load_config(None, ["model.num_hidden_layers=5", "model.hidden_size=32", "model.intermediate_size=48",
                                "model.num_attention_heads=4", "model.num_key_value_heads=2"]).model  # fmt: skip
    batch, length = 2, 16
    started = kernels.step_kernels(config, batch, length, torch.bfloat16, False)
    per_token = {
        part: sum(kernel.flops for kernel in started if kernel.part == part) / (batch * length)
        for part in kernels.PARTS
    }
    attention = 3.5 * 2 * config.hidden_size * length * config.num_hidden_layers
    masked = 3.5 * 2 * config.hidden_size * config.num_hidden_layers  # the formula also counts half of the diagonal
    expected = sum(flops.both for flops in layer_flops(config, length)) - masked
    assert per_token["attention"] == attention and per_token["elementwise"] == 0 < per_token["history"]
    assert sum(per_token.values()) == pytest.approx(expected)

    with kernels.Trace() as trace:
        left, right = torch.empty(4, 8, device="meta"), torch.empty(8, 16, device="meta")
        total = (left @ right).t()
        total += left[:1, :1].expand(16, 4)
    product, addition = trace.kernels
    assert product.nbytes == 4 * (4 * 8 + 8 * 16 + 4 * 16) and product.flops == 2 * 4 * 8 * 16
    assert addition.nbytes == 4 * (2 * 16 * 4 + 1) and addition.flops == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("step_cost.py", "--layers 4 --hidden 32 --heads 4 --kv-heads 4 2 --length 32 --repeats 1", 7),
        (
            "pipeline_cost.py",
            "--layers 8 --hidden 32 --heads 4 --length 32 --micro-batches 3 --rounds 1 --links loopback",
            61,
        ),
        ("planning.py", "--layers 4 --hidden 32 --length 32 --rounds 1 --links loopback", 19),
        ("reduction_cost.py", "--elements 1000 --layers 4 --hidden 32 --length 32 --rounds 1", 11),
        ("crossover.py", "--depths 8 16", 12),
        ("roofline.py", "--layers 4 --hidden 32 --heads 4 --kv-heads 4 2 --length 32", 9),
        ("depth_stability.py", "--layers 3 --hidden 16 --heads 2 --length 8 --steps 2", 18),
    ],
)
def test_a_benchmark_makes_its_table(script: str, arguments: str, rows: int, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / script), "--output", str(tmp_path), *arguments.split()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in finished.stdout
    assert sum(line.startswith("| ") and "---" not in line for line in table.splitlines()) >= rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("connection_cost.py", "--layers 4 --hidden 32 --heads 4 --kv-heads 2 --length 32", 6),
        ("document_mask.py", "--lengths 32 150 --time --layers 2 --hidden 64 --tokens 150 --rounds 1", 3),
    ],
)
def test_a_benchmark_prints_its_table(script: str, arguments: str, rows: int) -> None:
    command = [sys.executable, str(BENCHMARKS / script), *arguments.split()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert sum(line.startswith("| ") and "---" not in line for line in finished.stdout.splitlines()) == rows


@pytest.mark.slow
def test_the_cost_of_logging_is_measured_once(dataset: Path, tmp_path: Path) -> None:
    """The table has a row for every kind of work, each with calls; a second call is refused and changes nothing."""
    size = "model.hidden_size=32 model.intermediate_size=48 model.num_hidden_layers=4 data.sequence_length=32"
    often = "train.log_interval=2 monitor.router_interval=2 train.evaluation_samples=8"
    script = str(BENCHMARKS / "logging_cost.py")
    command = [sys.executable, script, "--data", str(dataset), "--output", str(tmp_path / "cost"), "--steps", "4"]
    first, second = (
        subprocess.run(
            [*command, *size.split(), *often.split()], capture_output=True, text=True, timeout=300, check=False
        )
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    table = (tmp_path / "cost/table.md").read_text()
    calls = {
        cells[1].strip(): int(cells[2].replace(",", ""))
        for line in table.splitlines()[2:]
        if (cells := line.split("|"))
    }
    assert table in first.stdout and list(calls)[-1] == "all" and len(calls) == 6
    assert calls["gathering numbers"] == calls["routers"] == 2 and calls["working them out"] == 4
    assert calls["reading the clock"] > 4 * 8 * 2 and calls["writing"] > 4
    assert second.returncode == 2 and second.stderr == (
        f"error: --output {tmp_path / 'cost'} is there already; give another folder, or delete it\n"
    )


@pytest.mark.slow
def test_a_task_is_made_learned_and_measured(tmp_path: Path) -> None:
    """Two models, one seed. A second call repeats no measurement; a run's result is deleted with its folder."""
    size = "data.sequence_length=32 train.evaluation_samples=32 optimizer.warmup_steps=1"
    command = [
        sys.executable,
        str(BENCHMARKS / "tasks.py"),
        "arithmetic",
        "--output",
        str(tmp_path),
        "--seeds",
        "0",
    ]
    command += ["--models", "llama", "lime-full", "--steps", "2", "--documents", "2000", "--jobs", "1", *size.split()]

    command += ["--questions", "20"]

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    first, second = call(), call()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in first.stdout and table in second.stdout and "| lime-full | 0.0 ± 0.0 | +0.0 |" in table
    assert first.stdout.count("of 20 solutions") == 2 and "of 20 solutions" not in second.stdout
    assert second.stdout.count("already finished") == 2
    shutil.rmtree(tmp_path / "llama-seed0")
    third = call()
    assert third.returncode == 0 and re.findall(r"(\S+): \d+ of 20 solutions", third.stdout) == ["llama-seed0"]


@pytest.mark.parametrize("script", ["step_cost.py", "pipeline_cost.py", "planning.py", "roofline.py"])
def test_a_mistake_in_the_call_is_one_line(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / script), "--output", str(tmp_path / "out"), "--hidden", "30"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    (line,) = finished.stderr.strip().splitlines()
    assert finished.returncode == 2 and line.startswith("error: model.hidden_size=30")
