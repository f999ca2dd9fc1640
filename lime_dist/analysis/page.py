"""The page that shows an analysis: pictures within it, and the tokens that turn dynamic routers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from lime_dist.analysis.findings import Findings
from lime_dist.analysis.routes import LEAST
from lime_dist.analysis.words import FOLDS, Occurrences
from lime_dist.report import html_page, note, section, table

EXPLAINED = {
    "Matrix entropy": "Of Z·Zᵀ over its trace, Z: the representations of a sample's tokens; mean over samples, with its "
    "standard error. 0: all tokens look alike.",
    "Linear separability of words": "Accuracy of logistic regression that tells the words apart by one layer's "
    "representation, over {folds} folds: mean, and standard deviation.",
    "Values of words (t-SNE)": "Each point is a word in its context.",
    "What layers read": "Each row divided by its sum. Of routers over keys and values: mean |weight| over pairs of heads; "
    "of dynamic ones: the mean over all tokens.",
    "Retrieval": "The rows of the maps in figures.",
}


def make_page(
    drawn: Mapping[str, Path], findings: Mapping[str, Findings], samples: Sequence[Tensor], words: Occurrences | None
) -> str:
    """The whole page, which needs nothing but itself."""
    read = f"{len(samples):,} samples of {len(samples[0]):,} tokens"
    if words is not None:
        read += f"; {words.each} occurrences each of: {', '.join(words.words)}"
    parts = [f"<h1>{escape(', '.join(findings))}</h1>", note(f"{read}.")]
    for title, path in drawn.items():
        image = base64.b64encode(path.read_bytes()).decode()
        shown = f'<img alt="{escape(title)}" style="max-width: 100%" src="data:image/png;base64,{image}">'
        parts.append(section(title, shown + note(EXPLAINED[title].format(folds=FOLDS))))
    parts += [section(f"Tokens that turn the router: {name}", _routes(one)) for name, one in findings.items()]
    return html_page(", ".join(findings), parts)


def _routes(one: Findings) -> str:
    if not one.dynamic:
        return ""
    rows = [
        [
            f"layer {route.layer}, head {route.head}",
            route.entry,
            f"{route.mean:.3f}",
            f"{route.spread:.3f}",
            "  ".join(f"{text!r} {weight:.2f}" for text, weight in route.tokens),
        ]
        for route in one.dynamic
    ]
    explained = f"Routes whose weight depends most on the type of token, of types that occur {LEAST} times or more."
    header = ["reads", "from", "mean weight", "deviation over types", "largest for, with the mean weight there"]
    return table(header, rows, "value") + note(explained)
