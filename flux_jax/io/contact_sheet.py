"""A sheet of pictures in rows, with captions below, for people to look at.

In: PIL images of one size, `stacked` where several belong to one caption, and texts; or files with verdicts. Out: one
PIL image.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from flux_jax.io.pictures import read_picture

RIGHT, WRONG = (40, 160, 70), (215, 35, 40)  # colours of frames
GAP, FRAME = 6, 3  # pixels between pictures, and of a frame
LINES, LINE_HEIGHT = 3, 12  # of captions: lines, pixels a line
CHARACTER, WIDEST_CHARACTER = 6.2, 7  # pixels of PIL's own font: on average, and so that nothing is cut


@dataclass(frozen=True)
class Judged:
    """A picture's file, its caption, and whether the picture is right."""

    path: Path
    caption: str
    right: bool


def judged_sheet(entries: Sequence[Judged], columns: int) -> Image.Image:
    """A sheet of files; a frame is green where the picture is right, red where it is not."""
    pictures = []
    for entry in entries:
        pictures.append(framed(read_picture(entry.path), RIGHT if entry.right else WRONG))
    return sheet(pictures, [entry.caption for entry in entries], columns)


def sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, labels: Sequence[str] = ()
) -> Image.Image:
    """Pictures, all of the first one's size, in rows of `columns`, each with its caption below. labels: texts at the
    left of every row, evenly beside the height of its pictures."""
    width, height = pictures[0].size
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    left = GAP + WIDEST_CHARACTER * longest if labels else 0
    step_x, step_y = width + GAP, height + LINES * LINE_HEIGHT + GAP
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (left + columns * step_x + GAP, rows * step_y + GAP), "white")
    pen = ImageDraw.Draw(page)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(i, columns)
        x, y = left + GAP + column * step_x, GAP + row * step_y
        page.paste(picture, (x, y))
        lines = textwrap.wrap(caption, max(1, int(width / CHARACTER)))[:LINES]
        for number, line in enumerate(lines):
            pen.text((x + 1, y + height + number * LINE_HEIGHT), line, fill="black")
    for row in range(rows):
        for number, label in enumerate(labels):
            middle = GAP + row * step_y + round((number + 0.5) * height / len(labels))
            pen.multiline_text((GAP, middle - LINE_HEIGHT), label, fill="black", spacing=2)
    return page


def framed(picture: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    width, height = picture.size
    frame = Image.new("RGB", (width + 2 * FRAME, height + 2 * FRAME), color)
    frame.paste(picture, (FRAME, FRAME))
    return frame


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size above each other, a gap between them."""
    width, height = pictures[0].size
    page = Image.new("RGB", (width, len(pictures) * (height + GAP) - GAP), "white")
    for number, picture in enumerate(pictures):
        page.paste(picture, (0, number * (height + GAP)))
    return page
