"""Find problems that would spoil a long job before it starts. (Each host runs the same command with --facts, --ring or --devices.)"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

import torch

from lime_dist.commands import CommandParser
from lime_dist.doctor import compute, facts, ring
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path

EXAMPLES = """examples:
  python -m lime_dist.doctor --config configs/quickstart.yaml
  python -m lime_dist.doctor --config configs/cluster/lime_64_2x8.yaml --hostfile hosts data.path=/shared/shards
  python -m lime_dist.doctor --config configs/quickstart.yaml --compute=30

Every finding is a line that begins with ok, warning or error. The exit status is 2 if there is an error, else 0.
Environment variables as for launch/multinode.sh: MASTER_ADDR, MASTER_PORT, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m lime_dist.doctor",
        description="Find problems that would spoil a long job before it starts.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--config", help="YAML file that configures the run; required")
    parser.add_argument(
        "--hostfile", type=user_path, help="lines 'HOST slots=N'; without one, only this machine is checked"
    )
    parser.add_argument("--verify", action="store_true", help="hash the shards instead of comparing their sizes only")
    parser.add_argument(
        "--compute",
        nargs="?",
        type=float,
        const=120.0,
        metavar="SECONDS",
        help="also let all devices multiply matrices for so long (default: 120), and name those that are slower than most",
    )
    parser.add_argument(
        "--devices", metavar="JSON", help=argparse.SUPPRESS
    )  # arguments of compute.measure on this host
    parser.add_argument("--facts", metavar="JSON", help=argparse.SUPPRESS)  # arguments of facts.gather on this host
    parser.add_argument("--ring", metavar="JSON", help=argparse.SUPPRESS)  # arguments of ring.measure in this process
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args(words)


def main() -> None:
    arguments = parse()
    if arguments.facts is not None:
        answer(facts.to_json(facts.gather(**json.loads(arguments.facts))))
    if arguments.ring is not None:
        answer(ring.to_json(ring.measure(**json.loads(arguments.ring))))
    if arguments.devices is not None:
        answer(compute.to_json(compute.measure(**json.loads(arguments.devices))))
    if arguments.compute is not None and arguments.compute <= 0:
        raise LimeError(f"--compute {arguments.compute:g}: give a number of seconds above 0")
    if arguments.config is None:
        raise LimeError("no configuration given; see python -m lime_dist.doctor --help")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it has to detect it
    # Imports DeepSpeed, which takes seconds; --facts and --ring do not need it.
    from lime_dist.doctor.diagnosis import diagnose

    if diagnose(arguments.config, arguments.overrides, arguments.hostfile, arguments.verify, arguments.compute):
        raise SystemExit(2)


def answer(line: str) -> None:
    """Print an answer and end the process at once, without the teardown of any library."""
    print(line, flush=True)
    os._exit(0)


if __name__ == "__main__":
    run_command(main)
