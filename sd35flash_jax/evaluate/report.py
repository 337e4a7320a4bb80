"""An evaluation for people: one table in Markdown, and grids of pictures."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sd35flash_jax.evaluate.scoring import Mark
from sd35flash_jax.evaluate.suite import Prompt

TILE = 192
"""Pixels a side of a picture in a grid."""
_RIGHT, _WRONG = 4, 2
_MARGIN = 6
_LINES, _LINE_HEIGHT = 4, 13
_LETTERS_A_LINE = 34


def format_table(report: dict[str, Any]) -> str:
    """A row for each sampler: its figures, with the standard deviation over seeds, and milliseconds a picture."""
    rows = report["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    header = ["sampler", "steps", "guidance", *names, "ms a picture"]
    lines = [f"{report['prompts']} prompts, {report['seeds']} seeds, {report['device']}, {report['date']}", ""]
    lines += [_line(header), _line(["---"] * len(header))]
    for row in rows:
        sampled = "steps" in row
        how = [str(row["steps"]), f"{row['guidance']:g}"] if sampled else ["", ""]
        figures = [_figure(row["figures"].get(name)) for name in names]
        lines.append(_line([row["name"], *how, *figures, f"{1000 * row['seconds']:.3g}" if sampled else ""]))
    return "\n".join(lines)


def draw_grid(prompts: Sequence[Prompt], marks: Sequence[Mark], tiles: Sequence[Image.Image]) -> Image.Image:
    """For each category a line of pictures with their prompts: the first right ones, then the first wrong ones, framed
    in red, with what was seen in them; where nothing is judged, the first ones."""
    lines = []
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        own = [index for index, prompt in enumerate(prompts) if prompt.category == category]
        right = [index for index in own if marks[index].right is not False]
        wrong = [index for index in own if marks[index].right is False][:_WRONG]
        lines.append(right[: _RIGHT + _WRONG - len(wrong)] + wrong)
    width, height = TILE + 2 * _MARGIN, TILE + 3 * _MARGIN + _LINES * _LINE_HEIGHT
    grid = Image.new("RGB", (width * (_RIGHT + _WRONG), height * len(lines)), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(11)
    for row, line in enumerate(lines):
        for column, index in enumerate(line):
            x, y = column * width + _MARGIN, row * height + _MARGIN
            if marks[index].right is False:
                draw.rectangle((x - 4, y - 4, x + TILE + 3, y + TILE + 3), fill="red")
            grid.paste(tiles[index], (x, y))
            said = prompts[index].text
            if marks[index].seen and marks[index].right is not True:
                said += f" [{marks[index].seen}]"
            words = "\n".join(wrap(said, _LETTERS_A_LINE)[:_LINES])
            draw.multiline_text((x, y + TILE + _MARGIN), words, "black", font, spacing=1)
    return grid


def shrink(image: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """A picture as a tile of a grid."""
    return Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(figure: dict[str, float | None] | None) -> str:
    if figure is None:
        return ""
    mean, spread = figure["mean"], figure["spread"]
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"
