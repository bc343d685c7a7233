"""A sheet of pictures with their captions and verdicts, for people to look at.

In: pictures [h, w, 3] with texts and verdicts. Out: one PIL image; a frame is green where the picture is right, red
where it is not.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

RIGHT, WRONG = (40, 160, 70), (215, 35, 40)
LINES, LINE_HEIGHT, CHARACTER = 3, 12, 6.2  # of captions: lines, pixels a line, pixels a character of PIL's own font
FRAME, GAP = 3, 6


def sheet(entries: Sequence[tuple[Path, str, bool]], columns: int) -> Image.Image:
    """(picture's file, caption, right or wrong) in rows of `columns`; all pictures have the first one's size."""
    pictures = []
    for path, _, _ in entries:
        with Image.open(path) as file:
            pictures.append(file.convert("RGB"))
    width, height = pictures[0].size
    step_x, step_y = width + 2 * FRAME + GAP, height + 2 * FRAME + LINES * LINE_HEIGHT + GAP
    rows = -(-len(entries) // columns)
    page = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, (_, caption, right) in enumerate(entries):
        x, y = GAP + (i % columns) * step_x, GAP + (i // columns) * step_y
        draw.rectangle((x, y, x + width + 2 * FRAME - 1, y + height + 2 * FRAME - 1), fill=RIGHT if right else WRONG)
        page.paste(pictures[i], (x + FRAME, y + FRAME))
        lines = textwrap.wrap(caption, int((width + 2 * FRAME) / CHARACTER))[:LINES]
        for number, line in enumerate(lines):
            draw.text((x + 1, y + height + 2 * FRAME + number * LINE_HEIGHT), line, fill="black")
    return page
