"""Parts of a self-contained HTML page: its frame and style, sections, tables and notes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin: 32px 0 8px; } h3 { font-size: 14px; margin: 16px 0 4px; }
table { border-collapse: collapse; } th, td { padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; } code, td.value { font-family: ui-monospace, monospace; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; } svg text { font-size: 11px; fill: #444; } .grid { stroke: #e5e5e5; }
.legend span { margin-right: 16px; } .legend i { display: inline-block; width: 12px; height: 12px; margin-right: 5px; }
.maps svg { display: block; }
.maps { display: flex; flex-wrap: wrap; gap: 24px; } .note { color: #777; }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """A self-contained HTML page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A heading with its content; empty if there is no content."""
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """An HTML table. Cells after the first of a row have the CSS class ``kind``."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(
        "<tr><td>" + f'</td><td class="{kind}">'.join(escape(cell) for cell in row) + "</td></tr>" for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def note(text: str) -> str:
    """A paragraph in grey."""
    return f'<p class="note">{escape(text)}</p>'


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, or their paths if two names are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
