"""Protects the report: it shows what the runs recorded, loads nothing from elsewhere, and names in one line what it cannot use."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.crashes import TAILS
from support.workers import WorkerGroup

from lime_dist import report
from lime_dist.checkpoint.manifest import manifest_checksum
from lime_dist.errors import LimeError
from lime_dist.monitor import html
from lime_dist.monitor.charts import Line, bar_chart, heat_map, line_chart, png, short, thinned, ticks
from lime_dist.monitor.routers import entropy, router_map, self_retrieval
from lime_dist.monitor.run_folder import read_router_weights, read_run

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 6


@pytest.fixture(scope="module")
def runs(
    workers: Callable[[int], WorkerGroup], dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Short runs on two stages: with a router map, with weights that depend on the token, and without a history."""
    folder = tmp_path_factory.mktemp("runs")
    models: dict[str, dict[str, Any]] = {
        "chunked": {"lime": {"history": {"policy": "chunked", "chunk_size": 2, "rank": 1, "first": 1}}},
        "dynamic": {"lime": {"routes": "hidden", "router": "dynamic"}},
        "llama": {"architecture": "llama"},
    }
    for name, model in models.items():
        values = {
            "run": {"directory": str(folder / name)},
            "model": {
                "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
                "num_attention_heads": 2, **model,
            },
            "data": {"path": str(dataset), "sequence_length": 16},
            "train": {
                "steps": 4, "global_batch_size": 2, "micro_batch_size": 1, "evaluation_interval": 2,
                "evaluation_samples": 2, "checkpoint_interval": 2,
            },
            "optimizer": {"warmup_steps": 1, "lr": 1e-3 if name == "llama" else 2e-3},
            "parallel": {"pipeline_stages": 2},
        }  # fmt: skip
        assert workers(2).run("support.runs.run", values=values) == ["", ""]
    return {name: folder / name for name in models}


def make(monkeypatch: pytest.MonkeyPatch, output: Path, *paths: Path) -> str:
    """Run the command and return the page."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, paths), "--output", str(output)])
    report.main()
    return output.read_text()


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails if tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_page_of_several_runs(monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tmp_path: Path) -> None:
    text = make(monkeypatch, tmp_path / "page.html", *runs.values())
    words = Page(text).words
    for path in runs.values():
        records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if "loss" in record]
        validations = [record["validation_loss"] for record in records if "validation_loss" in record]
        assert path.name in words and f"{losses[-1]:.4f}" in words and f"{validations[-1]:.4f}" in words
    reason = "its weights depend on the token; if the run has a validation, maps of their means are in TensorBoard"
    assert f"No map: {reason}." in words
    assert "No map: it has no layer history." in words
    rows = {
        cells[0]: cells[1:] for row in re.findall("<tr>(.*?)</tr>", text) if (cells := re.findall(">([^<]+)</td", row))
    }
    assert rows["model.architecture"] == ["lime", "lime", "llama"] and rows["optimizer.lr"] == [
        "0.002",
        "0.002",
        "0.001",
    ]
    assert rows["model.lime.history.rank"] == ["1", "None", "None"] and "model.hidden_size" not in rows
    assert "Sample texts" not in words, "no run has any"
    assert "Where the time went" in words and any(word.startswith("computation: ") for word in words)


def test_a_page_is_self_contained(monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tmp_path: Path) -> None:
    """No script, no frame, and only data: addresses."""
    page = Page(make(monkeypatch, tmp_path / "page.html", *runs.values()))
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "iframe", "img", "object", "embed", "base", "form", "audio", "video"}
    )
    addresses = [
        value for _, attributes in page.tags for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background")
    ]  # fmt: skip
    assert len(addresses) >= 2 and all(address is not None and address.startswith("data:") for address in addresses)
    styles = "".join(
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name == "style"
    )
    assert "url(" not in styles + html.STYLE and "@import" not in html.STYLE


def test_the_map_is_that_of_the_newest_checkpoint(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tmp_path: Path
) -> None:
    step, config, weights = read_router_weights(runs["chunked"])
    layers = router_map(config, weights)
    page = Page(make(monkeypatch, tmp_path / "page.html", runs["chunked"]))
    assert step == 4 and any(word.startswith("Step 4. Mean |weight|") for word in page.words)
    for layer in range(LAYERS):
        own, wide = self_retrieval(layers)[layer], entropy(layers)[layer]
        expected = f"layer {layer}: itself {100 * own:.0f} %, entropy {wide:.2f} nats; most: "
        assert any(word.startswith(expected) for word in page.words)
    assert "Settings" in page.words and "model.hidden_size" in page.words, "a single run shows all settings"


def test_time_is_split_where_it_is_recorded(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tmp_path: Path
) -> None:
    """An old run, which did not record it, has no bar."""

    def rewrite(name: str, **seconds: float) -> Path:
        copy = tmp_path / name
        shutil.copytree(runs["llama"], copy)
        lines = []
        for line in (copy / "metrics.jsonl").read_text().splitlines():
            record = {key: value for key, value in json.loads(line).items() if not key.startswith("seconds_")}
            lines.append(json.dumps(record | seconds if "loss" in record else record))
        (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return copy

    old = rewrite("old")
    split = rewrite("split", seconds_computation=3.0, seconds_transfer=1.0, seconds_data=0.0)
    words = Page(make(monkeypatch, tmp_path / "page.html", split, old)).words
    assert "computation: 12.0 s, 75.0 %" in words and "transfer: 4.0 s, 25.0 %" in words
    assert not any(word.startswith("data: ") for word in words)
    assert "Where the time went" not in Page(make(monkeypatch, tmp_path / "old.html", old)).words


# -- what is wrong with a run ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a run for a test to damage."""
    shutil.copytree(runs["chunked"], tmp_path / "broken")
    return tmp_path / "broken"


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("global_step*"), key=lambda path: int(path.name.removeprefix("global_step")))


def test_a_torn_last_line_is_left_out(broken: Path) -> None:
    whole = read_run(broken)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert read_run(broken) == whole


def test_numbers_that_are_not_finite_are_not_drawn(
    monkeypatch: pytest.MonkeyPatch, broken: Path, tmp_path: Path
) -> None:
    before = make(monkeypatch, tmp_path / "page.html", broken)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tokens": 500, "loss": NaN, "validation_loss": Infinity}\n')
    after = make(monkeypatch, tmp_path / "page.html", broken)
    curves = [re.findall(r'points="([^"]+)"', page) for page in (before, after)]
    assert curves[0] == curves[1] and len(curves[0]) == 4


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint"),
        (lambda run: (newest(run) / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda run: (newest(run) / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda run: (newest(run) / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda run: (newest(run) / "stage000-replica000.pt").unlink(), "stage000-replica000.pt cannot be read"),
        (lambda run: (newest(run) / "stage001-replica000.pt").write_bytes(b"no"), "stage001-replica000.pt is damaged"),
        (lambda run: overwrite(newest(run) / "stage001-replica000.pt"), "stage001-replica000.pt is damaged"),
        (lambda run: change(newest(run) / "manifest.json", '"num_hidden_layers": 6', '"num_hidden_layers": 8'), "is damaged"),
        (lambda run: change(newest(run) / "manifest.json", '"vocab_size"', '"vocabulary"'), "settings that this version"),
    ],
    ids=["none", "no manifest", "torn manifest", "odd manifest", "a file gone", "short file", "other bytes", "other model", "other version"],
)  # fmt: skip
def test_a_broken_checkpoint_leaves_the_map_out(
    monkeypatch: pytest.MonkeyPatch, broken: Path, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    harm(broken)
    words = Page(make(monkeypatch, tmp_path / "page.html", broken)).words
    (said,) = [word for word in words if word.startswith("No map: ")]
    assert message in said
    assert "Loss" in words


def overwrite(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


def change(file: Path, old: str, new: str) -> None:
    """Change a manifest and update its checksum, so that only the change itself can be detected."""
    text = re.sub(r":\s*", ": ", file.read_text())
    assert old in text
    manifest = json.loads(text.replace(old, new))
    file.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "is not a run folder: metrics.jsonl cannot be read"),
        (lambda run: (run / "metrics.jsonl").unlink(), "is not a run folder: metrics.jsonl cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl has no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "lo'), "metrics.jsonl has no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text("3\n"), "metrics.jsonl has no step yet"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml cannot be read"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml is not valid YAML"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, broken: Path, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    harm(broken)
    with pytest.raises(LimeError, match=re.escape(message)):
        make(monkeypatch, tmp_path / "page.html", broken)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("damage", TAILS.values(), ids=TAILS.keys())
def test_what_a_crash_left_is_left_out(
    monkeypatch: pytest.MonkeyPatch, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    file = broken / "metrics.jsonl"
    before = read_run(broken)
    first, _, rest = file.read_bytes().partition(b"\n")
    file.write_bytes(first + b"\n" + damage + b"\n" + rest)
    capsys.readouterr()
    assert read_run(broken).steps == before.steps
    warned = capsys.readouterr().err
    assert warned.count(f"warning: {file}: ") == 1 and "unreadable line(s) left out" in warned


def test_a_page_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path]) -> None:
    with pytest.raises(LimeError, match="--output /nowhere/page.html cannot be written"):
        make(monkeypatch, Path("/nowhere/page.html"), runs["llama"])


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lime_dist.report", str(tmp_path / "none")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    (line,) = finished.stderr.splitlines()
    assert finished.returncode == 2 and line.startswith("error: ") and "is not a run folder" in line


def test_runs_of_the_same_name_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], tmp_path: Path
) -> None:
    twin = tmp_path / "elsewhere" / "llama"
    shutil.copytree(runs["llama"], twin)
    words = Page(make(monkeypatch, tmp_path / "page.html", runs["llama"], twin)).words
    assert str(twin) in words and str(runs["llama"]) in words


def test_names_are_escaped(monkeypatch: pytest.MonkeyPatch, broken: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<script>&"
    broken.rename(odd)
    assert "<script>&" in Page(make(monkeypatch, tmp_path / "page.html", odd)).words


# -- charts ---------------------------------------------------------------------------------------------------------------


def test_losses_of_answers_are_called_so(monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], broken: Path) -> None:
    """They are over other tokens than the loss of a run that counts all."""
    settings = broken / "config.yaml"
    values = yaml.safe_load(settings.read_text())
    settings.write_text(yaml.safe_dump({**values, "data": {**values["data"], "answer_token": 5}}))
    page = broken.parent / "page.html"
    assert "validation loss, nats per answer token<" in make(monkeypatch, page, broken)
    mixed = make(monkeypatch, page, broken, *runs.values())
    assert "training loss, nats per token (answer token with data.answer_token)<" in mixed
    assert "training loss, nats per token<" in make(monkeypatch, page, *runs.values())


def test_a_line_is_where_its_points_are() -> None:
    drawn = line_chart([Line("a", "#000", [(0, 1), (5, 3), (10, 2)], dots=True)], "x", "y", (176, 156))
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert [(float(x), float(y)) for x, y in circles] == [(64, 112), (114, 12), (164, 62)]
    assert line_chart([Line("a", "#000", [(0, float("nan"))])], "x", "y") == ""
    assert "<polyline" in line_chart([Line("one point", "#000", [(3, 3)])], "x", "y")


def test_many_points_become_means() -> None:
    points = thinned([(float(i), float(i % 2)) for i in range(10_001)])
    assert len(points) <= 600 and points[0] == (8.0, 8 / 17) and points[-1][0] > 9990


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (4.2, 5.9, [4, 4.5, 5, 5.5, 6]), (3, 3, [3]), (0, 0.07, [0, 0.02, 0.04, 0.06, 0.08])],
)  # fmt: skip
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_numbers_on_axes() -> None:
    assert [short(x) for x in (0, 0.25, 1500, 2e6, 3.5e9, 1e12)] == ["0", "0.25", "1.5k", "2M", "3.5G", "1T"]


def test_bars_are_as_long_as_their_parts() -> None:
    drawn = bar_chart([("a", [("computation", 3.0), ("waiting", 1.0)]), ("b", [("waiting", 2.0)])])
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert widths == pytest.approx([396, 132, 264])
    assert bar_chart([]) == bar_chart([("a", [])]) == ""


def test_a_map_is_a_picture_of_its_cells() -> None:
    """Decoded: 0 is white, and values above the end of the scale have the colour of its end."""
    cells = [[1.0, 0, 0], [0.5, 1.0, 0], [9.0, 0.25, float("nan")]]
    drawn, top = heat_map(cells, ["r0", "r1", "r2"], "x", "y")
    assert top == 1.0 and [f"<title>r{row}</title>" in drawn for row in range(3)] == [True] * 3
    data = base64.b64decode(re.search(r"base64,([^\"]+)", drawn)[1])
    length = int.from_bytes(data[33:37], "big")
    rows = zlib.decompress(data[41 : 41 + length])
    pixels = [[tuple(rows[10 * y + 1 + 3 * x :][:3]) for x in range(3)] for y in range(3)]
    white, dark = (255, 255, 255), (8, 48, 107)
    assert pixels[0] == [dark, white, white] and pixels[2][0] == dark and pixels[2][2] == white
    assert pixels[1][0] == (132, 152, 181) and pixels[2][1][0] > pixels[1][0][0]
    assert heat_map([[0.0]], ["r0"], "x", "y")[1] == 1.0


def test_pictures_are_png_files(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    (tmp_path / "p.png").write_bytes(png([bytes([255, 0, 0, 0, 255, 0]), bytes([0, 0, 255, 9, 8, 7])]))
    assert (image.imread(tmp_path / "p.png") * 255).round().tolist() == [
        [[255, 0, 0], [0, 255, 0]],
        [[0, 0, 255], [9, 8, 7]],
    ]


def test_bits_per_byte_and_a_caution_where_vocabularies_differ(
    monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    """Perplexities of different vocabularies cannot be compared; bits per byte of the same text can."""
    run = read_run(runs["llama"])
    best = min(record["validation_loss"] for record in run.validations)
    facts = json.loads((dataset / "dataset.json").read_text())["splits"]["validation"]
    wanted = best / math.log(2) * facts["tokens"] / facts["text_bytes"]
    assert report.bits_per_byte(run, best) == pytest.approx(wanted)
    text = make(monkeypatch, tmp_path / "page.html", runs["llama"], runs["chunked"])
    assert f"{wanted:.4f}" in Page(text).words and "different vocabularies" not in text
    other = tmp_path / "other"
    shutil.copytree(runs["llama"], other)
    settings_file = other / "config.yaml"
    settings = settings_file.read_text()
    settings_file.write_text(settings.replace(str(dataset), str(tmp_path / "moved")))
    assert "different vocabularies" not in make(monkeypatch, tmp_path / "page.html", runs["llama"], other)
    settings_file.write_text(settings.replace("vocab_size: 320", "vocab_size: 640"))
    assert "different vocabularies" in make(monkeypatch, tmp_path / "page.html", runs["llama"], other)
    for broken in ("path: nowhere", "answer_token: 5"):
        key = broken.partition(":")[0]
        settings = {**run.settings, f"data.{key}": broken.partition(": ")[2]}
        assert report.bits_per_byte(replace(run, settings=settings), best) is None
