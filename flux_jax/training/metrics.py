"""The numbers of a training: a JSON object a line, and the same as a picture.

In: numbers by phase and step. Out: `FOLDER/metrics.jsonl` and, where matplotlib is installed, `FOLDER/curve.png`. A
training that goes on after a kill writes the lines behind its last checkpoint again. Only the leading process writes.
"""

import contextlib
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import jax

from flux_jax.errors import UserError
from flux_jax.io import reading
from flux_jax.io.atomic import write_whole
from flux_jax.io.fields import Types, wrong_fields
from flux_jax.io.places import cannot_write

NEEDED: Types = {"phase": str, "step": int}  # of a line
LEGEND = 12  # curves of a panel that have a legend; of more it would hide them


class Metrics:
    """`metrics.jsonl` of one run. A phase's name may have two words: the panel of its curve, and the curve's."""

    def __init__(self, folder: Path):
        self.path, self.curve = folder / "metrics.jsonl", folder / "curve.png"

    def rows(self) -> list[dict[str, Any]]:
        """All lines. Half a line, left by a kill, is none, and so is what is no line of ours: a training does not end
        for the sake of its metrics."""
        if not self.path.exists():
            return []
        rows = []
        for line in reading.read_bytes(self.path, most=reading.LARGE).splitlines():
            with contextlib.suppress(UserError):
                if isinstance(row := reading.parse_json(line, str(self.path)), dict) and not wrong_fields(row, NEEDED):
                    rows.append(row)
        return rows

    def forget_after(self, phase: str, step: int) -> None:
        """Drops the lines of `phase` beyond `step`."""
        if jax.process_index() == 0:
            kept = [row for row in self.rows() if row["phase"] != phase or row["step"] <= step]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode(), overwrite=True)

    def log(self, **numbers: Any) -> None:
        """A line; numbers that are not finite are null, for JSON has none. `time` is the time of day, UTC."""
        if jax.process_index() == 0:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            line = json.dumps(clean | {"time": stamp}) + "\n"
            try:
                with self.path.open("a") as stream:  # not whole by a rename: see `rows`
                    stream.write(line)
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def plot(self) -> None:
        """Losses over steps, or over `after` where lines have that: a panel for each kind of phase."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows():
            if isinstance(row.get("loss"), int | float):
                curves.setdefault(row["phase"], []).append(row)
        panels = list(dict.fromkeys(phase.split()[0] for phase in curves))
        if jax.process_index() > 0 or not panels:
            return
        figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = {phase: rows for phase, rows in curves.items() if phase.split()[0] == panel}
            over = "after" if all("after" in row for rows in shown.values() for row in rows) else "step"
            for phase, rows in shown.items():
                places, losses = [row[over] for row in rows], [row["loss"] for row in rows]
                axes.plot(places, losses, marker="o" * (over == "after"), label=phase.removeprefix(f"{panel} "))
            axes.set(title=panel, ylabel="loss", yscale="log", xlabel=over)
            axes.grid(alpha=0.3)
            if 1 < len(shown) <= LEGEND:
                axes.legend(fontsize=7)
        figure.savefig(picture := io.BytesIO(), format="png", dpi=100)
        write_whole(self.curve, picture.getvalue(), overwrite=True)
