"""Compare the plan's ranking of step times with measured ones: settings of two processes, over loopback and a slow link.

Two processes build every setting once. Each round runs one step of every setting; the first round warms up and is
dropped. A setting counts by its fastest round, because other work on the machine only makes rounds slower. The plan is given the
measured speed of links and of memory (while both processes copy), and one more number: the FLOP/s with which
it predicts LLaMA's step over loopback correctly. Settings that differ by less than 5 % are not ranked.

examples:
  python benchmarks/planning.py --output runs/planning
  python benchmarks/planning.py --output runs/planning --links loopback --rounds 5
  python benchmarks/planning.py --output /tmp/toy --hidden 32 --layers 8 --length 32 --rounds 1 --links loopback

The slow link needs root (two network namespaces); without root it is left out with a message. A link that is in
results.json of --output is not measured again.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from itertools import combinations
from typing import Any

from links import LOOPBACK, NoNamespaces, slow_link
from pair import run_pair
from results import read_results, write, write_results

from lime_dist import load_config
from lime_dist.config.schema import Config
from lime_dist.errors import LimeError, run_command
from lime_dist.paths import user_path
from lime_dist.plan.forecast import Forecast, Machine, forecast

FIRST_LAST = "model.lime.history={policy: first_last, first: 2, last: 1}"
CHUNKED = "model.lime.history={policy: chunked, chunk_size: 4, rank: 2, first: 2}"
ONE_STAGE, CHECKPOINTING = "parallel.pipeline_stages=1", "parallel.activation_checkpointing=true"
LLAMA = "model.architecture=llama"
SETTINGS: dict[str, list[str]] = {
    "llama": [LLAMA],
    "full": [],
    "first_last": [FIRST_LAST],
    "chunked": [CHUNKED],
    "full, bf16 on the wire": ["pipeline.wire_dtype=bf16"],
    "full, none extra in flight": ["pipeline.extra_in_flight=0"],
    "full, stock engine": ["pipeline.engine=stock"],
    "llama, checkpointed": [LLAMA, CHECKPOINTING],
    "first_last, checkpointed": [FIRST_LAST, CHECKPOINTING],
    "llama, half the layers": [LLAMA, "model.num_hidden_layers={half}"],
    "llama, a quarter of the layers on stage 0": [LLAMA, "parallel.stage_layers=[{quarter},{rest}]"],
    "llama, large vocabulary": [LLAMA, "model.vocab_size=16384"],
    "full, large micro-batches": ["train.micro_batch_size=4"],
    "llama, one micro-batch": [LLAMA, "train.micro_batch_size=16"],
    "llama, two replicas": [LLAMA, ONE_STAGE],
    "full, two replicas": [ONE_STAGE],
    "hidden, first_last": ["model.lime.routes=hidden", FIRST_LAST],
    "hyper": ["model.architecture=hyper"],
}
LINKS = ("loopback", "slow")
NOISE = 0.05

Result = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=user_path, help="folder for table.md and results.json")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--rate", default="200mbit", help="rate of the slow link, each way")
    parser.add_argument("--rounds", type=int, default=4, help="rounds that count")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=128, help="hidden size; the SwiGLU has four times as much")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "links")}
    for name in ("layers", "rounds", "hidden", "length"):
        if settings[name] < 1:
            raise LimeError(f"--{name} {settings[name]} must be at least 1")
    for name in SETTINGS:
        make_config(settings, name)  # report mistakes before anything runs
    results = read_results(arguments.output, settings)
    for link in arguments.links:
        if link in results:
            print(f"{link}: already measured", flush=True)
            continue
        try:
            with ExitStack() as stack:
                hosts = stack.enter_context(slow_link(arguments.rate, 0.0)) if link == "slow" else LOOPBACK
                results[link] = run_pair(hosts, "planning_worker.py", {**settings, "link": link})[0]
        except NoNamespaces as error:
            print(f"slow link left out: {error}", flush=True)
            continue
        write_results(arguments.output, settings, results)
    table = make_tables(settings, results)
    write(arguments.output / "table.md", table)
    print(table)


def make_config(settings: dict[str, Any], name: str) -> Config:
    """Return the configuration of a setting."""
    hidden, layers = settings["hidden"], settings["layers"]
    shape = [
        "model.vocab_size=4096", f"model.hidden_size={hidden}", f"model.intermediate_size={4 * hidden}",
        f"model.num_hidden_layers={layers}", "model.num_attention_heads=8", f"data.sequence_length={settings['length']}",
        "train.micro_batch_size=2", "train.global_batch_size=16", "parallel.pipeline_stages=2",
    ]  # fmt: skip
    numbers = {"half": layers // 2, "quarter": layers // 4, "rest": layers - layers // 4}
    own = [item if ": " in item else item.format(**numbers) for item in SETTINGS[name]]
    return load_config(None, [*shape, *own])


def calibrated(settings: dict[str, Any], results: dict[str, Result]) -> Result:
    """Return the machine for the plan: memory bandwidth as measured with loopback, if it was, and the FLOP/s
    with which LLaMA's step over loopback is predicted correctly."""
    base = results["loopback" if "loopback" in results else next(iter(results))]
    process = {"memory_bandwidth": base["memory_bandwidth"], "flops": 1e10}
    for _ in range(20):
        process["flops"] *= predict(settings, base, "llama", process).seconds / min(base["seconds"]["llama"])
    return process


def predict(settings: dict[str, Any], link: Result, name: str, process: Result) -> Forecast:
    machine = Machine(bandwidth=link["bandwidth"], latency=link["latency"], **process)
    return forecast(make_config(settings, name), machine, 2)


# -- tables ---------------------------------------------------------------------------------------------------------------


def make_tables(settings: dict[str, Any], results: dict[str, Result]) -> str:
    process = calibrated(settings, results)
    tables = [link_table(settings, link, results[link], process) for link in LINKS if link in results]
    speeds = f"memory {process['memory_bandwidth'] / 1e9:.1f} GB/s, measured; {process['flops'] / 1e9:.1f} GFLOP/s, from LLaMA's step"
    return "\n".join([f"a process: {speeds}\n", *tables])


def link_table(settings: dict[str, Any], link: str, result: Result, process: Result) -> str:
    """Return the table by setting in predicted order, with predicted and measured seconds, and then the pairs that are ranked wrongly."""
    forecasts = {name: predict(settings, result, name, process) for name in result["seconds"]}
    names = sorted(forecasts, key=lambda name: forecasts[name].seconds)
    fastest = {name: min(result["seconds"][name]) for name in names}
    places = {name: place for place, name in enumerate(sorted(names, key=lambda name: fastest[name]), 1)}
    speed = f"{result['bandwidth'] / 1e6:.0f} MB/s, {result['latency'] * 1e3:.2f} ms, measured"
    lines = [
        f"{link} ({speed})", "",
        "| setting | predicted, s | limit | measured, s | slowest round | measured / predicted | place, predicted | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for place, name in enumerate(names, 1):
        seconds, expected = result["seconds"][name], forecasts[name]
        lines.append(
            f"| {name} | {expected.seconds:.2f} | {expected.limit} | {fastest[name]:.2f} | {max(seconds):.2f} | "
            f"{fastest[name] / expected.seconds:.2f} | {place} | {places[name]} |"
        )
    lines += ["", compare(names, result["seconds"])]
    return "\n".join(lines) + "\n"


def compare(names: list[str], seconds: dict[str, list[float]]) -> str:
    """Compare the given order of names, the fastest first, with the order of their fastest rounds."""
    fastest = {name: min(rounds) for name, rounds in seconds.items()}
    pairs = list(combinations(names, 2))
    wrong = [pair for pair in pairs if fastest[pair[0]] > fastest[pair[1]]]
    apart = [
        pair for pair in pairs if max(fastest[name] for name in pair) > (1 + NOISE) * min(fastest[n] for n in pair)
    ]
    bad = [f"{a} before {b} ({fastest[a]:.2f}, {fastest[b]:.2f} s)" for a, b in wrong if (a, b) in apart]
    return (
        f"Kendall's tau over all {len(pairs)} pairs: {1 - 2 * len(wrong) / len(pairs):.2f}. Of the {len(apart)} pairs that "
        f"differ by more than {100 * NOISE:.0f} %, {len(bad)} are ranked the wrong way round{': ' if bad else ''}"
        f"{'; '.join(bad)}."
    )


if __name__ == "__main__":
    run_command(main)
