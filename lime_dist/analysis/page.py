"""The HTML page of an analysis: its pictures, and the tokens to which dynamic routers respond."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from lime_dist.analysis.findings import Findings
from lime_dist.analysis.routes import MIN_OCCURRENCES
from lime_dist.analysis.words import FOLDS, Occurrences
from lime_dist.monitor.html import html_page, note, section, table

EXPLAINED = {
    "Matrix entropy": "Entropy of Z·Zᵀ divided by its trace, where Z holds the representations of a sample's tokens: mean over "
    "samples with its standard error. 0: all tokens have the same direction.",
    "Linear separability of words": "Accuracy of a logistic regression that tells the words apart by the representation in "
    "one layer: mean and standard deviation over {folds} folds.",
    "Values of words (t-SNE)": "Each point is a word in its context.",
    "What layers read": "Each row is divided by its sum. Routers over keys and values: mean |weight| over pairs of heads; "
    "dynamic routers: mean over all tokens; mixture-of-depths attention: mean share of attention, that of the sequence for the layer "
    "itself; attention residuals: mean weight of a layer's outputs over tokens and reads, column −1 is the embedding.",
    "Retrieval": "Statistics of the rows of the maps.",
}


def make_page(
    drawn: Mapping[str, Path], findings: Mapping[str, Findings], samples: Sequence[Tensor], words: Occurrences | None
) -> str:
    """The self-contained HTML page."""
    read = f"{len(samples):,} samples of {len(samples[0]):,} tokens"
    if words is not None:
        read += f"; {words.each} occurrences each of: {', '.join(words.words)}"
    parts = [f"<h1>{escape(', '.join(findings))}</h1>", note(f"{read}.")]
    for title, path in drawn.items():
        image = base64.b64encode(path.read_bytes()).decode()
        shown = f'<img alt="{escape(title)}" style="max-width: 100%" src="data:image/png;base64,{image}">'
        parts.append(section(title, shown + note(EXPLAINED[title].format(folds=FOLDS))))
    parts += [section(f"Tokens to which the router responds: {name}", _routes(one)) for name, one in findings.items()]
    return html_page(", ".join(findings), parts)


def _routes(one: Findings) -> str:
    if not one.dynamic:
        return ""
    rows = [
        [
            f"layer {route.layer}, {route.reader}",
            route.entry,
            f"{route.mean:.3f}",
            f"{route.spread:.3f}",
            "  ".join(f"{text!r} {weight:.2f}" for text, weight in route.tokens),
        ]
        for route in one.dynamic
    ]
    explained = (
        f"Routes whose weight depends most on the token type, among types that occur at least {MIN_OCCURRENCES} times."
    )
    header = ["reads", "from", "mean weight", "deviation over types", "largest for, with mean weight"]
    return table(header, rows, "value") + note(explained)
