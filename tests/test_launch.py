"""Tests of the scripts in launch/: what runs where, which variables are sent, and ranks and requeuing under Slurm.

`tests/cluster/` runs them on several hosts, and under a real Slurm.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from lime_dist.doctor.hosts import read_hostfile
from lime_dist.errors import LimeError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/quickstart.yaml"

SRUN = """#!/usr/bin/env bash
# Starts the command once per task, passes signals on and exits with the largest status, as srun does.
echo "$1 $2" >>"$REQUEUED.options"
while [[ "$1" == --* ]]; do shift; done
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
  tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
largest=0
for task in "${tasks[@]}"; do
  wait "$task" && status=0 || status=$?
  ((status > 128)) && { wait "$task" && status=0 || status=$?; } # a signal interrupted the wait
  ((status > largest)) && largest=$status
done
exit "$largest"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") echo localhost && echo elsewhere ;;
  "requeue "*) echo "$2" >>"$REQUEUED" ;;
esac
"""
PYTHON = """#!/usr/bin/env bash
# Stands in for pretrain.py: prints its ranks, then ends by itself or, with WAITS, on a signal.
trap 'echo "rank $RANK saves"; exit 0' USR1
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK here, at $MASTER_ADDR:$MASTER_PORT, $OMP_NUM_THREADS threads: $*"
if [[ -n "${WAITS:-}" ]]; then for ((tick = 0; tick < 300; tick++)); do sleep 0.1; done; fi
exit "$((RANK == 1 ? ${STATUS:-0} : 0))"
"""
DEEPSPEED = """#!/usr/bin/env bash
echo "deepspeed $*"
echo "pdsh: $PDSH_SSH_ARGS_APPEND"
cat "$DS_ENV_FILE"
"""


def write(folder: Path, **programs: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment with a fake virtual environment, a fake Slurm and an empty home."""
    write(tmp_path / "venv/bin", python=PYTHON, deepspeed=DEEPSPEED)
    programs = write(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL, pdsh="#!/bin/sh\n", ssh="#!/bin/sh\n")
    key = subprocess.check_output(
        ["bash", "-c", "source launch/common.sh && requirements_key && echo"], cwd=ROOT, text=True
    )
    (tmp_path / "venv/lime_dist.installed").write_text(key)
    (tmp_path / "home").mkdir()
    return {
        "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path / "home"), "LIME_VENV": str(tmp_path / "venv"),
        "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip


def run(environment: dict[str, str], script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, **more}, capture_output=True, text=True, timeout=60, check=False
    )


def test_dry_runs(environment: dict[str, str], tmp_path: Path) -> None:
    """Nothing runs; the line of each host gives its ranks and its command."""
    (tmp_path / "hosts").write_text("# two\nnode1 slots=2\n\nnode2 slots=4 # more\n")
    python = f"{tmp_path}/venv/bin/python -u {ROOT}/pretrain.py --config {CONFIG} train.steps=3"
    local = run(environment, "local.sh", CONFIG, "3", "--dry-run", "train.steps=3")
    assert local.stdout == f"{os.uname().nodename}: ranks 0-2: {python}\n"
    several = run(
        environment, "multinode.sh", str(tmp_path / "hosts"), CONFIG, "--dry-run", "train.steps=3", OMP_NUM_THREADS="2"
    )
    lines = several.stdout.splitlines()
    assert lines[:2] == [f"node1: ranks 0-1: cd {ROOT}; OMP_NUM_THREADS=2 {python}", f"node2: ranks 2-5: cd {ROOT}; OMP_NUM_THREADS=2 {python}"]  # fmt: skip
    assert lines[2].startswith("started here by: ") and f"--hostfile {tmp_path / 'hosts'}" in lines[2]
    for arguments in (("--dry-run", CONFIG, "train.steps=3"), (CONFIG, "train.steps=3", "--dry-run")):
        slurm = run(environment, "slurm.sbatch", *arguments)
        assert slurm.stdout.splitlines() == [
            f"node1: ranks 0-7: cd {ROOT}; {python}",
            f"node2: ranks 8-15: cd {ROOT}; {python}",
        ]
    inside = run(
        environment, "slurm.sbatch", "--dry-run", CONFIG, SLURM_JOB_NODELIST="x[1-2]", SLURM_NTASKS_PER_NODE="4"
    )
    assert [line.partition(":")[0] for line in inside.stdout.splitlines()] == ["localhost", "elsewhere"]
    assert "elsewhere: ranks 4-7: " in inside.stdout
    assert all(done.returncode == 0 and not done.stderr for done in (local, several, slurm, inside))


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("local.sh", [], "no config given; see bash launch/local.sh --help"),
        ("local.sh", ["none.yaml"], "no such config file: none.yaml"),
        ("local.sh", [CONFIG, "2", "--steps"], "unknown argument '--steps'; see bash launch/local.sh --help"),
        ("multinode.sh", [], "no hostfile given; see bash launch/multinode.sh --help"),
        ("multinode.sh", ["none", CONFIG], "no such hostfile: none"),
        ("multinode.sh", ["launch/hostfile.example"], "no config given; see bash launch/multinode.sh --help"),
        ("multinode.sh", [CONFIG, CONFIG], "configs/quickstart.yaml, line 2: 'run:' is not 'HOST slots=N'"),
        ("multinode.sh", ["/dev/stdin", CONFIG], "/dev/stdin lists no host"),
        ("slurm.sbatch", [], "no config given; see bash launch/slurm.sbatch --help"),
        (
            "pretokenize.sbatch",
            ["8", "work"],
            "give PARTS FOLDER ARGUMENT ...; see bash launch/pretokenize.sbatch --help",
        ),
        (
            "pretokenize.sbatch",
            ["8", "work", "--input"],
            "not in a job array; call sbatch --array=1-8 launch/pretokenize.sbatch",
        ),
        ("slurm.sbatch", [CONFIG], "not in a Slurm job; call sbatch launch/slurm.sbatch CONFIG, or add --dry-run"),
    ],
)
def test_mistakes(environment: dict[str, str], script: str, arguments: list[str], line: str) -> None:
    arguments = [argument.replace("/dev/stdin", environment["HOME"] + "/hosts") for argument in arguments]
    Path(environment["HOME"], "hosts").write_text("# none\n")
    done = run(environment, script, *arguments)
    assert done.returncode == 2
    assert done.stderr == f"error: {line.replace('/dev/stdin', environment['HOME'] + '/hosts')}\n"


@pytest.mark.parametrize("script", ["gpu_check.sh", "local.sh", "multinode.sh", "slurm.sbatch"])
def test_help_is_the_page_at_the_top(environment: dict[str, str], script: str) -> None:
    done = run(environment, script, "--help")
    option = "--again" if script == "gpu_check.sh" else "--dry-run"
    assert done.returncode == 0 and all(word in done.stdout for word in ("Variables", "Example", option))


def test_what_is_sent_to_the_hosts(environment: dict[str, str]) -> None:
    """The variables of the launcher's files, cleaned up, and those variables that matter; nothing else."""
    Path(environment["HOME"], ".deepspeed_env").write_text("A=1\n\n# comment\nexport B=two words\nOMP_NUM_THREADS=1\n")
    more = {
        "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "2", "LD_LIBRARY_PATH": "/x",
        "LIME_EXPORT": "LD_LIBRARY_PATH", "DS_ACCELERATOR": "cpu", "LIME_BACKEND": "gloo", "SECRET": "s", "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4242", "PDSH_SSH_ARGS_APPEND": "-p 2222",
    }  # fmt: skip
    ssh = '#!/bin/sh\ncase "$*" in *"-p 2222"*) exit 0 ;; esac\necho "no answer at port 22" >&2\nexit 255\n'
    write(Path(environment["REQUEUED"]).parent / "bin", ssh=ssh)
    done = run(environment, "multinode.sh", "launch/hostfile.example", CONFIG, "--verbose", "train.steps=3", **more)
    assert done.returncode == 0, done.stderr
    _, command, pdsh, *variables = done.stdout.splitlines()
    arguments = f"{ROOT}/pretrain.py --config {CONFIG} --verbose train.steps=3"
    assert (
        command == f"deepspeed --hostfile launch/hostfile.example --master_port 4242 --master_addr 10.0.0.1 {arguments}"
    )
    assert pdsh.startswith("pdsh: -p 2222 -oServerAliveInterval=15")
    assert variables[:3] == ["A=1", "B=two words", "OMP_NUM_THREADS=1"]
    assert sorted(variables[3:]) == [
        "DS_ACCELERATOR=cpu", "GLOO_SOCKET_IFNAME=eth0", "LD_LIBRARY_PATH=/x", "LIME_BACKEND=gloo", "NCCL_DEBUG=INFO",
        "OMP_NUM_THREADS=2",
    ]  # fmt: skip
    refused = run(environment, "multinode.sh", "launch/hostfile.example", CONFIG, NCCL_DEBUG_FILE="a\nb")
    assert refused.returncode == 2
    assert refused.stderr == "error: NCCL_DEBUG_FILE cannot be sent to the hosts: its value has a newline\n"
    without = {
        **environment,
        "PATH": environment["PATH"].replace(str(Path(environment["REQUEUED"]).parent / "bin"), "/none"),
    }
    if subprocess.run(["bash", "-c", "command -v pdsh"], env=without, capture_output=True, check=False).returncode:
        done = run(without, "multinode.sh", "launch/hostfile.example", CONFIG)
        assert done.returncode == 2 and done.stderr.startswith("error: pdsh is not installed here")


def test_values_arrive_unchanged(environment: dict[str, str]) -> None:
    """From this shell through the launcher's file, DeepSpeed's quotes and pdsh to the shell of a host."""
    sent = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG_FILE": "/tmp/nccl.%h.%p.100%%", "NCCL_IB_HCA": "^mlx5_0,=mlx5_1:1",
        "OMP_PLACES": "{0:4}, {4:4}", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:512",
        "PYTORCH_ALLOC_CONF": "", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": """it's "a" $HOME `id` \\ ; & path""", "UCX_TLS": "tcp",
    }  # fmt: skip
    unsent = {"PYTORCHX": "1", "CUDAX": "1", "MY_CUDA_HOME": "1"}
    done = run(environment, "multinode.sh", "launch/hostfile.example", CONFIG, **sent, **unsent)
    assert done.returncode == 0, done.stderr
    runner = PDSHRunner(argparse.Namespace(user_args=[], user_script=""), "")
    for line in done.stdout.splitlines()[3:]:
        runner.add_export(*line.split("=", maxsplit=1))
    assert set(runner.exports) == set(sent)
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    arrived = re.sub("%(.)", lambda match: {"%": "%", "h": "node1", "u": "root", "n": "0"}[match[1]], exports)
    printed = subprocess.check_output(["bash", "-c", f"{arrived} env -0"], env={"PATH": os.environ["PATH"]}, text=True)
    assert sent.items() <= dict(line.split("=", maxsplit=1) for line in printed.split("\0") if line).items()


# -- through the real launcher --------------------------------------------------------------------------------------------

WITNESS = """#!{python}
# Stands in for the virtual environment's python: writes what it was started with, or answers the script's question for GPUs.
import json, os, sys
if sys.argv[1] == "-c":
    print(os.environ.get("GPUS", "0"), 29631)
else:
    names = ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "FROM_FILE")
    with open(os.path.join(os.environ["WITNESSED"], os.environ["RANK"]), "w") as file:
        json.dump([sys.argv[1:], {{name: os.environ.get(name) for name in names}}], file)
"""
SSH = """#!/usr/bin/env bash
# Runs the command on this machine, as a shell of the host would. A host named "gone" does not answer.
while [[ "$1" == -* ]]; do
  case "$1" in -o | -p | -l) shift ;; esac
  shift
done
host="$1"
shift
if [[ "$host" == gone ]]; then echo "ssh: connect to host gone port 22: No route to host" >&2 && exit 255; fi
[[ "$*" == *"hostname -I" ]] && echo 127.0.0.1 && exit
exec sh -c "$*"
"""


@pytest.fixture
def real(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment with the real `deepspeed` and pdsh, over an ssh to hosts that are this machine."""
    deepspeed = f'#!/bin/sh\nexec {sys.executable} -m deepspeed.launcher.runner "$@"\n'
    write(tmp_path / "venv/bin", python=WITNESS.format(python=sys.executable), deepspeed=deepspeed)
    (tmp_path / "bin/pdsh").unlink()
    write(tmp_path / "bin", ssh=SSH)
    (tmp_path / "witnessed").mkdir()
    return {**environment, "WITNESSED": str(tmp_path / "witnessed")}


def witnessed(environment: dict[str, str]) -> dict[int, tuple[list[str], dict[str, str | None]]]:
    """By rank, the arguments and the variables of the processes that were started."""
    files = Path(environment["WITNESSED"]).iterdir()
    return {int(file.name): tuple(json.loads(file.read_text())) for file in files}


HAS_PDSH = shutil.which("pdsh") is not None

NASTY = [
    "&", "'", '"', "(", ")", "a b", "a  b", " ", "$HOME", "${HOME}", "$(id)", "`id`", ";", "|", "<x>", "*", "?", "[a]", "{a,b}", "~",
    "~/x", "#x", "!x", "\\", "\\ ", "a\\'b", '\\"', '" "', "' '", "$ `", "%h", "%n", "%%", "%d x", "\t", "é …", "=", "", "a=b&c", "^x^",
    '[{path: "a b", weight: 1}, {path: $X, weight: 2}]', "\\$x y", "x\\", "x y\\",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PDSH, reason="pdsh is not installed")
def test_every_argument_arrives_unchanged_on_other_hosts(real: dict[str, str], tmp_path: Path) -> None:
    """Through `deepspeed`, pdsh, ssh and a shell, beside the devices that the user chose; a CRLF hostfile with comments and tabs."""
    (tmp_path / "hosts").write_bytes(b"# two\r\nhost-a\tslots=1\r\n\r\n  host-b slots=1 # more\r\n")
    overrides = [f"a.key{number}={value}" for number, value in enumerate(NASTY)]
    (Path(real["HOME"]) / ".deepspeed_env").write_text("FROM_FILE=1\n")
    done = run(real, "multinode.sh", str(tmp_path / "hosts"), CONFIG, *overrides, CUDA_VISIBLE_DEVICES="5,4")
    assert done.returncode == 0, done.stderr
    words = ["-u", f"{ROOT}/pretrain.py", "--config", CONFIG, *overrides]
    variables = {"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5,4", "FROM_FILE": "1"}
    assert witnessed(real) == {rank: (words, {"RANK": str(rank), **variables}) for rank in range(2)}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PDSH, reason="pdsh is not installed")
def test_a_single_remote_host_is_the_one_that_trains(real: dict[str, str], tmp_path: Path) -> None:
    """It is started over ssh, like several; a host that is this machine is not, and needs no ssh."""
    write(tmp_path / "bin", ssh=SSH.replace("exec sh", 'echo "on $host"; exec sh'))
    (tmp_path / "hosts").write_text("elsewhere slots=2\n")
    given = {"CUDA_VISIBLE_DEVICES": "0,1", "MASTER_ADDR": "127.0.0.1"}
    done = run(real, "multinode.sh", str(tmp_path / "hosts"), CONFIG, **given)
    assert done.returncode == 0 and "elsewhere: on elsewhere" in done.stdout, done.stdout + done.stderr
    assert set(witnessed(real)) == {0, 1}
    write(tmp_path / "bin", ssh="#!/bin/sh\nexit 1\n")
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    (Path(real["HOME"]) / ".deepspeed_env").write_text("export FROM_FILE=1\n")
    done = run(real, "multinode.sh", str(tmp_path / "hosts"), CONFIG, "x=&", **given)
    assert done.returncode == 0, done.stderr
    words, variables = witnessed(real)[0]
    assert words[-1] == "x=&" and variables["WORLD_SIZE"] == "1" and variables["FROM_FILE"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("address", ["", "127.0.0.1"])
@pytest.mark.parametrize("hosts", [["gone", "b"], ["a", "gone"], ["gone"]])
def test_a_host_that_does_not_answer(real: dict[str, str], tmp_path: Path, hosts: list[str], address: str) -> None:
    """It ends the script before anything is started, on any host."""
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    write(tmp_path / "bin", pdsh=f"#!/bin/sh\ntouch {tmp_path}/started\n")
    more = {"MASTER_ADDR": address} if address else {}
    done = run(real, "multinode.sh", str(tmp_path / "hosts"), CONFIG, **more)
    assert done.returncode == 2
    assert done.stderr == (
        "error: gone cannot be reached with ssh (ssh: connect to host gone port 22: No route to host); python -m "
        "lime_dist.doctor checks the hosts\n"
    )
    assert not (tmp_path / "started").exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PDSH, reason="pdsh is not installed")
def test_a_port_in_use_on_the_first_host(real: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    write(tmp_path / "venv/bin", python=f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    write(tmp_path / "bin", pdsh="#!/bin/sh\necho 'pdsh failed' >&2; exit 1\n")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run(real, "multinode.sh", str(tmp_path / "hosts"), CONFIG, MASTER_PORT=str(port))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(rf"error: port {port} of \S+ cannot be used \(Address already in use\)", done.stderr), done.stderr
    assert "choose another: MASTER_PORT" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["3", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-1/2/0", ""])
def test_the_users_devices_on_this_machine(real: dict[str, str], devices: str) -> None:
    """Whatever the form of the choice, the process of `deepspeed` sees it. (An empty one hides all GPUs.)"""
    done = run(real, "local.sh", CONFIG, "1", CUDA_VISIBLE_DEVICES=devices, GPUS="1" if devices else "0")
    assert done.returncode == 0, done.stderr
    assert "VISIBLE_DEVICES" not in done.stdout, "`deepspeed` has not seen it"
    words, variables = witnessed(real)[0]
    assert words == ["-u", f"{ROOT}/pretrain.py", "--config", CONFIG] and variables["CUDA_VISIBLE_DEVICES"] == devices


@pytest.mark.parametrize(
    ("script", "devices", "more", "line"),
    [
        ("local.sh", "3", {}, "CUDA_VISIBLE_DEVICES=3 names 1 device(s) for 2 processes"),
        ("local.sh", "GPU-1", {}, "CUDA_VISIBLE_DEVICES=GPU-1 names 1 device(s) for 2 processes"),
        ("local.sh", "0 1", {}, "CUDA_VISIBLE_DEVICES='0 1' is no list of devices"),
        (
            "local.sh",
            "6,7",
            {"GPUS": "1"},
            "CUDA_VISIBLE_DEVICES=6,7: torch sees 1 of these devices, 2 processes need one each",
        ),
        ("quickstart.sh", "3", {}, "CUDA_VISIBLE_DEVICES=3 names 1 device(s) for 2 processes"),
        ("multinode.sh", "0,1", {}, "CUDA_VISIBLE_DEVICES=0,1 names 2 device(s) for 8 processes"),
        ("multinode.sh", ",".join(f"GPU-{n}" for n in range(8)), {}, "names devices of one machine"),
    ],
)
def test_devices_that_are_refused(
    real: dict[str, str], tmp_path: Path, script: str, devices: str, more: dict[str, str], line: str
) -> None:
    write(tmp_path / "bin", **{"nvidia-smi": "#!/bin/sh\n"})
    arguments = {"local.sh": [CONFIG, "2"], "multinode.sh": ["launch/hostfile.example", CONFIG]}.get(script, [])
    done = run(real, script, *arguments, CUDA_VISIBLE_DEVICES=devices, **more)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and line in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not witnessed(real)


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh", "slurm.sbatch"])
def test_a_dry_run_can_be_pasted(environment: dict[str, str], script: str) -> None:
    """A shell reads every argument back as it was given."""
    overrides = [f"a.key{number}={value}" for number, value in enumerate(NASTY)]
    first = ["launch/hostfile.example"] if script == "multinode.sh" else []
    done = run(environment, script, *first, CONFIG, *overrides, "--dry-run")
    line = done.stdout.splitlines()[0].partition(": ranks ")[2].partition(": ")[2]
    read = subprocess.check_output(
        ["bash", "-c", f"printf '%s\\0' {line if script == 'local.sh' else line.partition('; ')[2]}"], text=True
    )
    assert done.returncode == 0 and read.split("\0")[-len(overrides) - 1 : -1] == overrides


@pytest.mark.parametrize("name", ["a b", "a'b"])
def test_a_folder_that_deepspeed_cannot_send_is_refused(environment: dict[str, str], tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    config = (tmp_path / name / "c.yaml").resolve()
    config.write_text("{}")
    command = ["bash", str(ROOT / "launch/multinode.sh"), str(ROOT / "launch/hostfile.example"), "c.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=config.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot be sent to the hosts: DeepSpeed does not quote it" in done.stderr


# -- hostfiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "slots"),
    [
        (b"a slots=1\r\nb slots=2\r\n", {"a": 1, "b": 2}),
        (b"a\tslots=1\n\n \t\n  b   slots=2", {"a": 1, "b": 2}),
        (b"#x\na slots=1#y\n # z\nme@10.0.0.2 slots=12 # y", {"a": 1, "me@10.0.0.2": 12}),
        (b"a slots=0\n", None), (b"a slots=-1\n", None), (b"a slots=01\n", None), (b"a slots=1.5\n", None), (b"a\n", None),
        (b"a slots=1\nb slots=1\na slots=1\n", None), (b"a slots = 1\n", None), (b"a slots=1 b\n", None), (b"", None),
        (b"# a slots=1\n", None), (b"a[1-2] slots=1\n", None), (b"a,b slots=1\n", None), (b"\xff slots=1\n", None),
        (b"\xef\xbb\xbfa slots=1\n", None), (b"a\0 slots=1\n", None), (b"a;id slots=1\n", None),
    ],
)  # fmt: skip
def test_one_reader_of_hostfiles(
    environment: dict[str, str], tmp_path: Path, content: bytes, slots: dict[str, int] | None
) -> None:
    """The doctor, the script and `deepspeed` agree on each file, or refuse it."""
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_bytes(content)
    done = run(environment, "multinode.sh", str(path), CONFIG, "--dry-run")
    if slots is None:
        assert done.returncode == 2 and re.fullmatch(rf"error: {path}(, line \d+:)? .*\n", done.stderr), done.stderr
        with pytest.raises(LimeError, match=re.escape(str(path))):
            read_hostfile(path)
        return
    assert done.returncode == 0 and not done.stderr
    ranks = [re.match(r"(\S+): ranks (\d+)-(\d+): ", line) for line in done.stdout.splitlines()[:-1]]
    assert {match[1]: int(match[3]) - int(match[2]) + 1 for match in ranks if match} == slots
    assert read_hostfile(path) == slots == dict(fetch_hostfile(str(path)))


# -- Slurm ------------------------------------------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "20007", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "x[1-2]", "SLURM_CPUS_PER_TASK": "3"}


def requeued(environment: dict[str, str]) -> list[str]:
    path = Path(environment["REQUEUED"])
    return path.read_text().split() if path.exists() else []


def test_a_task_of_an_array_writes_its_part(environment: dict[str, str]) -> None:
    given = ["--input", "a b", "--tokenizer", "t"]
    done = run(
        environment, "pretokenize.sbatch", "8", "parts", *given, SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="4"
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.endswith(
        f": -m data_tools.pretokenize --input a b --tokenizer t --output {ROOT}/parts/part-3 --part 3/8 --workers 4\n"
    )


def test_ranks_under_slurm(environment: dict[str, str]) -> None:
    """Each task becomes a rank; the first node is the master. A job that ends by itself is not requeued."""
    done = run(environment, "slurm.sbatch", CONFIG, "train.steps=3", **JOB)
    assert done.returncode == 0 and not done.stderr
    first, *ranks = done.stdout.splitlines()
    assert first == "job 20007, start 1: 2 processes, master localhost:10007"
    command = f"-u {ROOT}/pretrain.py --config {CONFIG} train.steps=3"
    assert sorted(ranks) == [f"rank {n} of 2, {n} here, at localhost:10007, 3 threads: {command}" for n in range(2)]
    options = Path(f"{environment['REQUEUED']}.options").read_text()
    assert options == "--kill-on-bad-exit=1 --cpus-per-task=3\n", "since 22.05 srun does not take it from the job"
    told = run(
        environment, "slurm.sbatch", CONFIG, **JOB, MASTER_ADDR="10.0.0.1", MASTER_PORT="4242", OMP_NUM_THREADS="1"
    )
    assert "rank 1 of 2, 1 here, at 10.0.0.1:4242, 1 threads" in told.stdout
    failed = run(environment, "slurm.sbatch", CONFIG, **JOB, STATUS="2")
    assert failed.returncode == 2
    assert requeued(environment) == []


@pytest.mark.parametrize(
    ("sent", "status", "expected"),
    [(signal.SIGUSR1, "0", ["20007"]), (signal.SIGUSR1, "1", []), (signal.SIGTERM, "0", [])],
    ids=["time limit", "failed at the time limit", "ended by Slurm"],
)
def test_a_signal_from_slurm(environment: dict[str, str], sent: int, status: str, expected: list[str]) -> None:
    """Before the time limit the run saves and the job is requeued, unless saving failed or Slurm ends the job."""
    trap = PYTHON.replace("exit 0' USR1", f"exit {status}' USR1")
    write(Path(environment["LIME_VENV"], "bin"), python=trap)
    job = {**environment, **JOB, "WAITS": "1", "SLURM_RESTART_COUNT": "4"}
    command = ["bash", "launch/slurm.sbatch", CONFIG]
    with subprocess.Popen(
        command, cwd=ROOT, env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("job 20007, start 5: ") and all(line.startswith("rank ") for line in lines[1:])
        process.send_signal(sent)
        said = process.stdout.read()
    assert process.returncode == int(status) and said.count(" saves") == 2, said
    assert requeued(environment) == expected
    assert ("is requeued" in said) == bool(expected)


@pytest.mark.slow
def test_pretrain_under_the_slurm_script(environment: dict[str, str], dataset: Path, tmp_path: Path) -> None:
    """A whole two-stage run of the real pretrain.py as two tasks of the fake srun."""
    write(Path(environment["LIME_VENV"], "bin"), python=f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    overrides = [
        f"data.path={dataset}", f"run.directory={tmp_path / 'run'}", "data.sequence_length=16", "model.vocab_size=320",
        "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=4", "train.steps=4",
        "train.global_batch_size=4", "train.micro_batch_size=1", "train.evaluation_samples=4",
    ]  # fmt: skip
    more = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if "PYTHONPATH" in os.environ:
        more["PYTHONPATH"] = os.environ["PYTHONPATH"]
    done = run(environment, "slurm.sbatch", CONFIG, *overrides, **JOB, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 layers in 2 stage(s) × 1 replica(s)" in done.stdout and re.search("validation loss: ", done.stdout)
    assert (
        len(
            re.findall(r"^stage 0 to 1: .* a micro-batch: hidden state \+ 1 partial mixture", done.stdout, re.MULTILINE)
        )
        == 2
    )
    assert requeued(environment) == []
