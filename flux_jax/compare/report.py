"""What people look at: a page that needs nothing but itself, a grid as in the paper's figures, a curve.

In: a finished comparison's folder, metrics and settings. Out: `index.html` (pictures, script and style inside: nothing
is loaded from anywhere), `grid.png`, `report.json`.
"""

import base64
import importlib.resources
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flux_jax.compare import metrics
from flux_jax.compare.drawing import ComparisonTask
from flux_jax.io import atomic
from flux_jax.io.contact_sheet import sheet, stacked
from flux_jax.io.pictures import read_picture

LARGE = 512  # pixels: from there on the page holds pictures as WebP, which is a tenth of the size
GRID_COLUMNS, GRID_PICTURES, GRID_EDGE = 6, 24, 320  # prompts in a row, in all, pixels of a picture's longer edge


def write(
    out: Path, tasks: Sequence[ComparisonTask], rows: Sequence[dict[str, Any]], about: dict[str, Any]
) -> dict[str, Any]:
    """Writes the three files; returns what report.json holds. about: `a`, `b` (names), `sampling`, `networks`
    (what judged, in words), more settings."""
    result = about | {"summary": metrics.summary(rows), "pictures": list(rows)}
    atomic.write_whole(out / "report.json", (json.dumps(result, indent=1) + "\n").encode(), overwrite=True)
    buffer = io.BytesIO()
    grid(out, tasks, about["a"], about["b"]).save(buffer, format="png")
    atomic.write_whole(out / "grid.png", buffer.getvalue(), overwrite=True)
    atomic.write_whole(out / "index.html", page(out, tasks, rows, result).encode(), overwrite=True)
    return result


def page(out: Path, tasks: Sequence[ComparisonTask], rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> str:
    """The HTML page, worst pictures first."""
    import jinja2

    template = importlib.resources.files("flux_jax.compare").joinpath("page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    size = read_picture(tasks[0].picture("a", out)).size
    cards = [
        row | {side: data_uri(read_picture(task.picture(side, out), size)) for side in "ab"}
        for task, row in zip(tasks, rows, strict=True)
    ]
    cards.sort(key=lambda card: float("inf") if card["psnr"] is None else card["psnr"])
    return environment.from_string(template).render(
        result=result,
        summary=result["summary"],
        verdict=metrics.verdict(result["summary"]),
        interval=metrics.interval,
        curve=_uri(curve(result["summary"]), "png"),
        cards=cards,
    )


def data_uri(image: Image.Image) -> str:
    """The picture as text for the page: PNG to the last bit while it is small, else WebP at quality 90."""
    buffer = io.BytesIO()
    if max(image.size) < LARGE:
        image.save(buffer, format="png")
        return _uri(buffer.getvalue(), "png")
    image.save(buffer, format="webp", quality=90)
    return _uri(buffer.getvalue(), "webp")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def curve(summary: dict[str, Any]) -> bytes:
    """The latents' error behind each step, median and largest, as the bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 2.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(summary["latent_errors_median"]) + 1)
    axes.plot(steps, summary["latent_errors_largest"], color="tab:red", label="largest", marker=".")
    axes.plot(steps, summary["latent_errors_median"], color="tab:blue", label="median", marker=".")
    axes.set(xlabel="step", ylabel="|b − a| / |a| of latents", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def grid(out: Path, tasks: Sequence[ComparisonTask], a: str, b: str) -> Image.Image:
    """The first prompts' pictures, the first model's above the second's, captions below."""
    shown = tasks[:GRID_PICTURES]
    first = read_picture(shown[0].picture("a", out))
    scale = min(1.0, GRID_EDGE / max(first.size))
    size = max(1, round(first.width * scale)), max(1, round(first.height * scale))
    pairs = [stacked([_thumbnail(task.picture(side, out), size) for side in "ab"]) for task in shown]
    labels = ["\n".join(re.split("[@,]", name)) for name in (a, b)]  # an option a line
    return sheet(pairs, [task.prompt for task in shown], min(GRID_COLUMNS, len(shown)), labels)


def _thumbnail(path: Path, size: tuple[int, int]) -> Image.Image:
    return read_picture(path).resize(size, Image.Resampling.LANCZOS)
