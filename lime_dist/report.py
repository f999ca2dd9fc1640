"""Compare runs in one self-contained HTML page."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from lime_dist.commands import CommandParser
from lime_dist.data.dataset import read_dataset_json
from lime_dist.errors import LimeError, run_command
from lime_dist.model.architecture import architecture_of
from lime_dist.monitor.charts import COLOURS, Line, bar_chart, heat_map, legend, line_chart
from lime_dist.monitor.html import distinct_names, html_page, note, section, table
from lime_dist.monitor.run_folder import RunFolder, read_router_weights, read_run
from lime_dist.monitor.tags import SET_PREFIX, set_name
from lime_dist.paths import user_path

EXAMPLES = """examples:
  python -m lime_dist.report runs/quickstart
  python -m lime_dist.report runs/quickstart runs/quickstart-llama --output comparison.html"""

SPLIT = {
    "seconds_computation": "computation",
    "seconds_transfer": "transfer",
    "seconds_waiting": "waiting",
    "seconds_data": "data",
    "seconds_checkpoint": "checkpoint",
    "seconds_validation": "validation",
}
"""Keys of metrics.jsonl that split the time of a step, with their labels. A run without any of them has no bar."""

SMALL = (520, 185)
"""Width and height of the charts beside a map, in pixels."""


def parse() -> argparse.Namespace:
    parser = CommandParser(prog="python -m lime_dist.report", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=user_path, default=Path("report.html"), help="HTML file to write (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    runs = [read_run(path) for path in arguments.runs]
    page = make_page(runs)
    partial = arguments.output.with_name(f".{arguments.output.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(arguments.output)
    except OSError as error:
        raise LimeError(f"--output {arguments.output} cannot be written: {error.strerror}") from None
    print(f"report: {arguments.output} ({len(runs)} run{'s' if len(runs) > 1 else ''}, {len(page) / 1e3:,.0f} kB)")


def make_page(runs: Sequence[RunFolder]) -> str:
    """The HTML page."""
    names = distinct_names([run.path for run in runs])
    title = ", ".join(names)
    parts = [
        "<h1>" + escape(title) + "</h1>",
        section("Final figures", figures(runs, names) + vocabulary_caution(runs)),
        section("Loss", loss_curves(runs, names)),
        section("Where the time went", time_split(runs, names)),
        section("What layers read", '<div class="maps">' + "\n".join(map(router_picture, runs, names)) + "</div>"),
        section("Sample texts", "\n".join(filter(None, map(sample_texts, runs, names)))),
        section("Settings that differ" if len(runs) > 1 else "Settings", settings_table(runs, names)),
    ]
    return html_page(title, parts)


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def figures(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """A row per run: model, progress, last losses, speed."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        last = (run.steps or run.validations)[-1]
        losses = [(record["validation_loss"], record["step"]) for record in run.validations]
        best = min(losses, default=None)
        seconds = [record["step_seconds"] for record in run.steps if "step_seconds" in record]
        rate = [record["tokens_per_second"] for record in run.steps if "tokens_per_second" in record]
        rows.append(
            [
                name,
                str(run.settings.get("model.architecture", "")),
                str(run.settings.get("model.num_hidden_layers", "")),
                f"{last['step']:,}",
                f"{last['tokens']:,}" if "tokens" in last else "",
                f"{run.steps[-1]['loss']:.4f}" if run.steps else "",
                f"{losses[-1][0]:.4f}" if losses else "",
                f"{best[0]:.4f} (step {best[1]:,})" if best else "",
                f"{math.exp(best[0]):,.1f}" if best and best[0] < 50 else "",
                f"{bits:.4f}" if best and (bits := bits_per_byte(run, best[0])) is not None else "",
                f"{median(rate):,.0f}" if rate else "",
                f"{sum(seconds):,.0f}" if seconds else "",
            ]
        )
    header = [
        "run", "model", "layers", "steps", "tokens", "loss", "validation loss", "best", "its perplexity", "bits per byte",
        "tokens/s, median", "seconds of steps",
    ]  # fmt: skip
    return table(header, rows, "number")


def bits_per_byte(run: RunFolder, loss: float) -> float | None:
    """A validation loss in bits per byte of text, which does not depend on the vocabulary.

    Returns:
        None: the shards are not where the run read them or do not say how long their text is, or losses count answers only.
    """
    facts = validation_facts(run)
    if run.settings.get("data.answer_token") is not None or not facts.get("tokens") or not facts.get("text_bytes"):
        return None
    return loss / math.log(2) * float(facts["tokens"]) / float(facts["text_bytes"])


def validation_facts(run: RunFolder) -> dict[str, Any]:
    """What dataset.json says of the validation split of a run's data; {} if it cannot be read."""
    try:
        facts = read_dataset_json(str(run.settings.get("data.path")))["splits"]["validation"]
    except (LimeError, KeyError, TypeError):
        return {}
    return facts if isinstance(facts, dict) else {}


def tokenizer_hash(run: RunFolder) -> str | None:
    """The hash of the tokenizer of a run's data; None if it cannot be read, as of a blend or of shards that have moved."""
    try:
        return str(read_dataset_json(str(run.settings.get("data.path")))["tokenizer_hash"])
    except (LimeError, KeyError):
        return None


def vocabulary_caution(runs: Sequence[RunFolder]) -> str:
    """A note if losses and perplexities of these runs cannot be compared."""
    sizes = {run.settings.get("model.vocab_size") for run in runs}
    hashes = {known for run in runs if (known := tokenizer_hash(run)) is not None}
    if len(hashes) <= 1 and len(sizes) == 1:
        return ""
    return note(
        "These runs have different vocabularies: their losses and perplexities are per token of their own and cannot be compared. "
        "Bits per byte of the validation text can, if the text is the same."
    )


def loss_curves(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Training and validation loss against tokens."""
    charts, answers = [], [run.settings.get("data.answer_token") is not None for run in runs]
    unit = (
        "answer token" if all(answers) else "token" + (" (answer token with data.answer_token)" if any(answers) else "")
    )
    for key, title, dots in (("loss", "Training", False), ("validation_loss", "Validation", True)):
        lines = [
            Line(name, colour(index), points(run.validations if dots else run.steps, key), dots)
            for index, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        chart = line_chart(lines, "tokens", f"{title.lower()} loss, nats per {unit}")
        charts += [f"<h3>{title}</h3>\n{chart}"] if chart else []
    keys = dict.fromkeys(key for run in runs for record in run.validations for key in record)
    for key in keys:
        if key.startswith(SET_PREFIX):
            lines = [
                Line(name, colour(index), points([one for one in run.validations if key in one], key), True)
                for index, (run, name) in enumerate(zip(runs, names, strict=True))
            ]
            chart = line_chart(lines, "tokens", f"loss on {set_name(key)}, nats per {unit}")
            charts += [f"<h3>Validation: {escape(set_name(key))}</h3>\n{chart}"] if chart else []
    return "\n".join([*charts, legend([(name, colour(index)) for index, name in enumerate(names)])])


def points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(record.get("tokens", record["step"])), float(record[key])) for record in records]


def time_split(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """A bar per run that recorded it: the seconds of all steps by kind of work."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        totals = {
            label: sum(record.get(key, 0.0) for record in run.steps + run.validations) for key, label in SPLIT.items()
        }
        if any(totals.values()):
            rows.append((name, [(label, seconds) for label, seconds in totals.items() if seconds > 0]))
    return bar_chart(rows)


def router_picture(run: RunFolder, name: str) -> str:
    """The router map of a run's newest checkpoint, or the reason why there is none."""
    try:
        step, config, weights = read_router_weights(run.path)
    except LimeError as error:
        return f"<div><h3>{escape(name)}</h3>\n{note(f'No map: {error}.')}</div>"
    from lime_dist.monitor.routers import entropy, has_mean_map, router_map, self_retrieval

    if not weights:
        reason = architecture_of(config).router_map_obstacle or "it has no routers"
        reason += "; if the run has a validation, maps of their means are in TensorBoard" * has_mean_map(config)
        return f"<div><h3>{escape(name)}</h3>\n{note(f'No map: {reason}.')}</div>"

    try:
        map_LL = router_map(config, weights)
    except (KeyError, RuntimeError) as error:
        return f"<div><h3>{escape(name)}</h3>\n{note(f'No map: the checkpoint of step {step} is damaged ({error}).')}</div>"
    own, wide = self_retrieval(map_LL), entropy(map_LL)
    titles = []
    for layer, row in enumerate(map_LL):
        values, sources = row.sort(descending=True)
        largest = ", ".join(
            f"{source} ({value:.3g})"
            for value, source in zip(values[:3].tolist(), sources[:3].tolist(), strict=True)
            if value
        )
        titles.append(
            f"layer {layer}: itself {100 * own[layer]:.0f} %, entropy {wide[layer]:.2f} nats; most: {largest}"
        )
    picture, top = heat_map(map_LL.tolist(), titles, "layer that is read", "layer that reads")
    lines = [
        line_chart([Line("share of its own", colour(0), list(enumerate(own)), True)], "layer", "self-retrieval", SMALL),
        line_chart([Line("entropy", colour(1), list(enumerate(wide)), True)], "layer", "entropy, nats", SMALL),
    ]
    caption = f"Step {step:,}. Mean |weight| over heads; the darkest colour is {top:.3g} and above."
    return f"<div><h3>{escape(name)}</h3>\n{picture}\n{note(caption)}</div>\n<div>{lines[0]}\n{lines[1]}</div>"


def sample_texts(run: RunFolder, name: str) -> str:
    """What the model wrote at the first, the middle and the last sample."""
    if not run.samples:
        return ""
    last = len(run.samples) - 1
    rows = [
        [f"{run.samples[index]['step']:,}", str(prompt), str(text)]
        for index in sorted({0, last // 2, last})
        for prompt, text in run.samples[index]["sample_texts"].items()
    ]
    return f"<h3>{escape(name)}</h3>\n{table(['step', 'prompt', 'continuation'], rows, 'value')}"


def settings_table(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """The settings in which the runs differ; all settings of a single run."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [[key, *(shown(run, key) for run in runs)] for key in keys]
    if len(runs) > 1:
        rows = [row for row in rows if len(set(row[1:])) > 1]
    return table(["key", *names], rows, "value") if rows else note("None.")


def shown(run: RunFolder, key: str) -> str:
    return str(run.settings[key]) if key in run.settings else "–"


if __name__ == "__main__":
    run_command(main)
