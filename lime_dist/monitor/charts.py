"""Charts as inline SVG. Hovering over a mark shows its value as a tooltip."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000"]
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44
POINTS = 600
"""Maximum number of points of a line; longer ones are averaged in groups."""


@dataclass(frozen=True)
class Line:
    """A curve. Points that are not finite are left out.

    Attributes:
        dots: whether its points are marked.
    """

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    """Curves over common axes; empty if they have no point."""
    kept = [(line, thinned([p for p in line.points if all(map(math.isfinite, p))])) for line in lines]
    xs, ys = ([p[axis] for _, points in kept for p in points] for axis in (0, 1))
    if not xs:
        return ""
    width, height = size
    x_low, x_high = min(xs), max(xs)
    x_low = 0.0 if 0 < x_low < 0.1 * x_high else x_low
    x_ticks, y_ticks = [tick for tick in ticks(x_low, x_high) if x_low <= tick <= x_high], ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return LEFT + across * (width - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>')
    for line, points in kept:
        places = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        title = f"<title>{escape(line.label)}</title>"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.5">{title}</polyline>'
        )
        marked = zip(points, places, strict=True) if line.dots else []
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{line.colour}">'
            f"<title>{escape(line.label)}: {value:.4f} at {short(at)} {escape(x_label)}</title></circle>"
            for (at, value), (x, y) in marked
        ]
    middle = (height - BOTTOM + TOP) / 2
    parts.append(f'<text x="{(width + LEFT) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return svg(width, height, parts)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points, each the mean of consecutive ones."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def bar_chart(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """One stacked bar per row, of parts (name, seconds); parts of the same name have the same colour."""
    names = list(dict.fromkeys(name for _, parts in rows for name, _ in parts))
    longest = max((sum(value for _, value in parts) for _, parts in rows), default=0.0)
    if longest <= 0:
        return ""
    left, step = 180, 30
    drawn = []
    for index, (label, parts) in enumerate(rows):
        y, x, whole = TOP + index * step, float(left), sum(value for _, value in parts) or 1.0
        drawn.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        for name, value in parts:
            width = value / longest * (WIDTH - left - RIGHT)
            title = f"{escape(name)}: {value:,.1f} s, {100 * value / whole:.1f} %"
            colour = COLOURS[names.index(name) % len(COLOURS)]
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" fill="{colour}"><title>{title}</title></rect>'
            )
            x += width
    return svg(WIDTH, TOP + len(rows) * step, drawn) + legend(
        [(name, COLOURS[names.index(name) % len(COLOURS)]) for name in names]
    )


def heat_map(cells: Sequence[Sequence[float]], titles: Sequence[str], x_label: str, y_label: str) -> tuple[str, float]:
    """A square map with row 0 on top, and the value from which on a cell has the darkest colour.

    Args:
        titles: the tooltip of each row.
    """
    size, side = len(cells), 320
    pixels, top = coloured(cells)
    picture = base64.b64encode(png([b"".join(row) for row in pixels])).decode()
    height = side / size
    parts = [
        f'<image x="{LEFT}" y="{TOP}" width="{side}" height="{side}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{picture}"/>',
        f'<rect x="{LEFT}" y="{TOP}" width="{side}" height="{side}" fill="none" stroke="#888"/>',
    ]
    for row, title in enumerate(titles):
        parts.append(
            f'<rect x="{LEFT}" y="{TOP + row * height:.2f}" width="{side}" height="{height:.2f}" fill="transparent">'
            f"<title>{escape(title)}</title></rect>"
        )
    for tick in (tick for tick in ticks(0, size - 1) if tick == int(tick) and 0 <= tick < size):
        middle = (tick + 0.5) * height
        parts.append(f'<text x="{LEFT - 6}" y="{TOP + middle + 4:.1f}" text-anchor="end">{tick:.0f}</text>')
        parts.append(f'<text x="{LEFT + middle:.1f}" y="{TOP + side + 16}" text-anchor="middle">{tick:.0f}</text>')
    parts.append(f'<text x="{LEFT + side / 2}" y="{TOP + side + 34}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {TOP + side / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return svg(LEFT + side + RIGHT, TOP + side + BOTTOM, parts), top


def coloured(cells: Sequence[Sequence[float]]) -> tuple[list[list[bytes]], float]:
    """A pixel (red, green, blue) for each cell, the darker the larger its |value|; and where the scale ends.

    The scale ends at the 98th percentile of the cells that are not 0, so that a few large ones do not hide the others.
    """
    values = sorted(abs(value) for row in cells for value in row if value and math.isfinite(value))
    top = values[int(0.98 * (len(values) - 1))] if values else 1.0
    shades = [[min(1.0, abs(value) / top) if math.isfinite(value) else 0.0 for value in row] for row in cells]
    return [[blue(shade) for shade in row] for row in shades], top


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">\n{inside}\n</svg>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """The names beside their colours, in one line."""
    parts = [f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries]
    return f'<p class="legend">{" ".join(parts)}</p>'


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers that cover ``low`` to ``high``."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    begin = math.floor(low / step + 1e-9)
    return [step * index for index in range(begin, math.ceil(high / step - 1e-9) + 1)]


def short(number: float) -> str:
    """A number as an axis shows it: 1.2, 400k, 3M."""
    for suffix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.4g}{suffix}"
    return f"{number:.4g}"


def png(rows: Sequence[bytes]) -> bytes:
    """Rows of pixels, three bytes each, as a PNG file without filters."""
    raw = b"".join(b"\0" + row for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]) // 3, len(rows), 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def blue(shade: float) -> bytes:
    """White for 0, dark blue for 1."""
    dark = (8, 48, 107)
    return bytes(round(255 + (end - 255) * shade) for end in dark)
