"""Check and measure the program on this machine's GPUs, in under ten minutes, and write one table for benchmarks/RESULTS.md.

equality     one process trains as the CPU does: every model, fp32 and bf16: losses, gradients, norms, parameters
shared       two stages, and two replicas, on one GPU over gloo, through host memory: the same comparison
nccl         the same over NCCL, on two GPUs; also with CUDA_LAUNCH_BLOCKING=1
memory       peak of live bytes of a step, over what the plan says
kernels      kernels a layer, and how often the host waits for the device in a step
step_cost    a step of each history policy over LLaMA's (step_cost.py)
cluster      tokens/s and MFU of the configurations in configs/cluster, cut to one stage and to the memory at hand
compiled     with train.compile: the comparison with the CPU, and the speed of a cluster configuration

Without a GPU all of it runs on the CPU with small sizes; what needs GPUs says so. Each section is a process with a time limit.
A section that passed is not repeated by the same command on the same machine and code; one that failed is.

examples:
  python benchmarks/gpu_check.py --output runs/gpu_check
  python benchmarks/gpu_check.py --output runs/gpu_check --sections memory kernels --again

Exit status: 0 if no section failed, else 1; 2 for a mistake in the call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lime_dist.paths import user_path

BENCHMARKS = Path(__file__).resolve().parent
NEEDED = {"torch": "torch", "numpy": "numpy", "packaging": "packaging", "pydantic": "pydantic", "yaml": "pyyaml"}
"""Packages that everything here needs, by module."""


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        title: in the table.
        limit: seconds after which it is stopped.
        gpus: that it needs.
        engine: whether it needs DeepSpeed.
    """

    title: str
    limit: float
    gpus: int = 0
    engine: bool = True


SECTIONS = {
    "equality": Section("One process equals the CPU", 150),
    "shared": Section("Two processes on one device over gloo equal the CPU", 120),
    "nccl": Section("Two processes on two GPUs over NCCL equal the CPU", 150, gpus=2),
    "memory": Section("Peak memory over the plan", 90),
    "kernels": Section("Kernels a layer, and host waits a step", 120),
    "step_cost": Section("Step over LLaMA's", 180, engine=False),
    "cluster": Section("Cluster configurations cut to one stage", 120),
    "compiled": Section("Compiled layers equal the CPU", 180, gpus=1),
}
TOTAL = 600.0
"""Seconds after which no section is started."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", required=True, type=user_path, help="folder for table.md, and a file and a log of each section"
    )
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
                        help="run only these; the table has all that were measured")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="run sections that have passed once more")
    parser.add_argument("--small", action="store_true", help="small sizes on a GPU too")
    return parser.parse_args()


def main() -> None:
    from gpu_check_report import FAILED, PASSED, Report, make_table, read_report
    from results import write

    from lime_dist.errors import LimeError

    arguments = parse()
    output: Path = arguments.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LimeError(f"--output {arguments.output}: {error}; give another folder") from None
    machine = machine_facts()
    machine["sizes"] = "small" if arguments.small or "GPUs" not in machine else "full"
    print(f"{machine['device']}: {output}", flush=True)
    end = time.monotonic() + TOTAL
    for name in arguments.sections:
        section, path = SECTIONS[name], output / f"{name}.json"
        before = read_report(path)
        if before is not None and before.machine == machine and before.status == PASSED and not arguments.again:
            print(f"{name}: already measured", flush=True)
            continue
        report = Report(path, machine)
        left = end - time.monotonic()
        if reason := lacks(section, machine):
            report.leave_out(reason)
        elif left < 10:
            report.leave_out("no time left; the same command runs it")
        else:
            report.save()
            problem = run_section(name, output, machine, min(section.limit, left))
            report = read_report(path) or report  # what it has written
            if problem:
                report.status, report.summary = FAILED, f"{problem} ({report.summary}; see {name}.log)"
                report.save()
        print(f"{name}: {report.status}: {report.summary} ({report.seconds:.0f} s)", flush=True)
    kept = {name: read_report(output / f"{name}.json") for name in SECTIONS}
    reports = {name: report for name, report in kept.items() if report is not None and report.machine == machine}
    table = make_table(machine, {name: section.title for name, section in SECTIONS.items()}, reports)
    write(output / "table.md", table)
    print(f"\n{table}\nin {output / 'table.md'}")
    statuses = {report.status for name, report in reports.items() if name in arguments.sections}
    raise SystemExit(1 if FAILED in statuses else 0)


def machine_facts() -> dict[str, str]:
    """The facts of `gpu_check_machine`, from another process: this one must not hold a GPU.

    Raises:
        LimeError: torch cannot use what it found.
    """
    from lime_dist.errors import LimeError

    command = [sys.executable, str(BENCHMARKS / "gpu_check_machine.py")]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise LimeError(f"torch cannot use this machine's devices: {last}")
    facts: dict[str, str] = json.loads(finished.stdout)
    return facts


def lacks(section: Section, machine: dict[str, str]) -> str:
    """Why the section cannot run here; empty if it can."""
    gpus = int(machine.get("GPUs", "0"))
    if section.engine and machine["DeepSpeed"] == "not installed":
        return "DeepSpeed is not installed; pip install -c constraints.txt deepspeed"
    if gpus < section.gpus:
        return "no GPU" if gpus == 0 else f"needs {section.gpus} GPUs, and there is {gpus}"
    return ""


def environment() -> dict[str, str]:
    """The environment of the sections: without what would change float32 products, or what a launcher left behind."""
    dropped = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "LIME_BACKEND"}
    dropped |= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")]))}


def run_section(name: str, output: Path, machine: dict[str, str], limit: float) -> str:
    """Run a section in a process group of its own; return what went wrong, empty if it ended by itself with status 0."""
    command = [sys.executable, str(BENCHMARKS / "gpu_check_section.py"), name, str(output), json.dumps(machine)]
    log = output / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(), start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what the section started and left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"ended with status {status}: {lines[-1][:300] if lines else 'it said nothing'}"


if __name__ == "__main__":
    sys.path.insert(0, str(BENCHMARKS.parent))
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed; pip install -c constraints.txt -e .", file=sys.stderr)
        raise SystemExit(2)
    from lime_dist.errors import run_command

    run_command(main)
