"""The numbers of a run: a JSON object a line, and the same as a picture.

In: numbers by phase and step. Out: `FOLDER/metrics.jsonl` and, where matplotlib is installed, `FOLDER/curve.png`. A run
that goes on after a kill writes the lines behind its last checkpoint again. Only the leading process writes.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax

from flux_jax.io.atomic import write_whole


class Metrics:
    """`metrics.jsonl` of one run."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "metrics.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """All lines; half a line, left by a kill, is none."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
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
            with self.path.open("a") as stream:
                stream.write(json.dumps(clean | {"time": stamp}) + "\n")

    def plot(self) -> None:
        """Losses over steps, a line for each block and phase; held-out losses over the phases behind them."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        rows = [row for row in self.rows() if row.get("loss") is not None]
        phases = list(dict.fromkeys(row["phase"] for row in rows))
        blocks = [phase for phase in phases if phase.startswith("blockwise ")]
        groups = {"blockwise": blocks, "end_to_end": ["end_to_end", "settle"], "held_out": ["held_out"]}
        shown = {title: names for title, names in groups.items() if set(names) & set(phases)}
        if jax.process_index() > 0 or not shown:
            return
        figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            for name in names:
                chosen = [row for row in rows if row["phase"] == name]
                places = [row.get("after", row["step"]) for row in chosen]
                label = name.removeprefix("blockwise ")
                axes.plot(places, [row["loss"] for row in chosen], marker="o" * (title == "held_out"), label=label)
            axes.set(title=title, ylabel="loss", yscale="log", xlabel="after" if title == "held_out" else "step")
            axes.grid(alpha=0.3)
            if title != "held_out" and len(names) <= 12:
                axes.legend(fontsize=7)
        figure.savefig(self.folder / "curve.png", dpi=100)
