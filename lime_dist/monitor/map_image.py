"""A map of weights as a picture with labelled axes and a colour scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lime_dist.monitor.charts import blue, coloured, ticks

SIDE = 512
"""Approximate length of the longer side of the cells in pixels, so that they are visible."""
MIN_CELL, MIN_HEIGHT = 4, 160
"""Smallest side of a cell, and smallest height of all cells; where it is needed, cells are higher than wide."""
LEFT, TOP, BOTTOM = 60, 12, 52
"""Margins for the axes."""
LINE = 24
"""Width of a label that is read from below, with the margin around it."""
BAR, GAP, TICK, SPACE = 14, 16, 4, 3
"""Width of the scale, its distance from the cells, length of a tick, distance of its label."""
WHITE, INK, FAINT = (255, 255, 255), (51, 51, 51), (136, 136, 136)


def map_image(
    cells: Sequence[Sequence[float]], x_label: str, y_label: str, scale_label: str, first_column: int = 0
) -> Image.Image:
    """The cells, row 0 on top, coloured by their absolute values; rows are numbered from 0, columns from ``first_column``."""
    pixels, top = coloured(cells)
    rows, columns = len(pixels), len(pixels[0])
    size = max(MIN_CELL, SIDE // max(rows, columns))
    width, height = columns * size, rows * max(size, math.ceil(MIN_HEIGHT / rows))
    colours = np.frombuffer(b"".join(b"".join(row) for row in pixels), np.uint8).reshape(rows, columns, 3)
    font, marks = ImageFont.load_default(14), _marks(top, height)
    beside = GAP + BAR + TICK + SPACE + math.ceil(max(font.getlength(text) for _, text in marks)) + LINE
    image = Image.new("RGB", (LEFT + width + beside, TOP + height + BOTTOM), WHITE)
    image.paste(Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST), (LEFT, TOP))
    draw = ImageDraw.Draw(image)
    draw.font = font
    right, bottom = LEFT + width, TOP + height
    draw.rectangle((LEFT - 1, TOP - 1, right, bottom), outline=FAINT)
    numbered = _numbers(columns + first_column, width, wide=True)
    if len(numbered) == columns + first_column:
        numbered = list(range(first_column, len(numbered)))
    for column in numbered:
        x = LEFT + (column - first_column + 0.5) * width / columns
        draw.line((x, bottom + 1, x, bottom + TICK), FAINT)
        draw.text((x, bottom + TICK + SPACE), str(column), INK, anchor="mt")
    for row in _numbers(rows, height, wide=False):
        y = TOP + (row + 0.5) * height / rows
        draw.line((LEFT - TICK - 1, y, LEFT - 2, y), FAINT)
        draw.text((LEFT - TICK - 1 - SPACE, y), str(row), INK, anchor="rm")
    draw.text((LEFT + width / 2, image.height - 8), x_label, INK, anchor="mb")
    _write_upwards(image, draw, (6, TOP + height // 2), y_label)
    _draw_scale(draw, right + GAP, height, marks)
    _write_upwards(image, draw, (image.width - LINE + 4, TOP + height // 2), scale_label)
    return image


def encoded(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _numbers(count: int, length: int, wide: bool) -> list[int]:
    """The rows or columns whose number is written: all if there is room, else round ones."""
    room = 8 * len(str(count - 1)) + 6 if wide else 15
    if count * room <= length:
        return list(range(count))
    return [int(tick) for tick in ticks(0, count - 1) if tick == int(tick) and tick < count]


def _marks(top: float, height: int) -> list[tuple[float, str]]:
    """Values between 0 and 1 of the whole scale, and what is written there; the last one is its end."""
    round_ones = [(value / top, f"{value:.3g}") for value in ticks(0, top) if (top - value) / top * height > LINE]
    return [*round_ones, (1.0, f"{top:.2g}+")]


def _draw_scale(draw: ImageDraw.ImageDraw, left: int, height: int, marks: Sequence[tuple[float, str]]) -> None:
    """A bar from 0 below to the darkest colour."""
    for row in range(height):
        draw.line((left, TOP + row, left + BAR - 1, TOP + row), tuple(blue(1 - row / (height - 1))))
    draw.rectangle((left - 1, TOP - 1, left + BAR, TOP + height), outline=FAINT)
    for share, text in marks:
        y = TOP + (height - 1) * (1 - share)
        draw.line((left + BAR + 1, y, left + BAR + TICK, y), FAINT)
        draw.text((left + BAR + TICK + SPACE, y), text, INK, anchor="lm")


def _write_upwards(image: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    """A text that is read from below, with the middle of its upper edge at ``place``."""
    _, _, right, bottom = draw.textbbox((0, 0), text)
    label = Image.new("RGB", (math.ceil(right) + 1, math.ceil(bottom) + 1), WHITE)
    ImageDraw.Draw(label).text((0, 0), text, INK, font=draw.font)
    turned = label.transpose(Image.Transpose.ROTATE_90)
    image.paste(turned, (place[0], place[1] - turned.height // 2))
