"""What every training run leaves in its folder: checkpoints to go on from, metrics, a curve.

In: a state (any tree of arrays) and numbers. Out: `FOLDER/checkpoints` (Orbax, the last two), `FOLDER/metrics.jsonl`
(an object a line) and `FOLDER/curve.png` (where matplotlib is installed). Killed at any moment, a run restores the
last checkpoint and writes the metrics behind it again.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax

from flux_jax.io.atomic import write_whole


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path):
        from orbax.checkpoint import v1 as ocp

        path.mkdir(parents=True, exist_ok=True)
        self.path, self.metrics = path, path / "metrics.jsonl"
        self._checkpoints = ocp.training.Checkpointer(
            path.absolute() / "checkpoints", preservation_policy=ocp.training.preservation_policies.LatestN(2)
        )

    def restore(self, state: Any) -> tuple[Any, int]:
        """(state, step) of the last checkpoint, each array placed as in `state`; (state, 0) where there is none."""
        if not (latest := self._checkpoints.latest):
            return state, 0
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        return self._checkpoints.load(latest, abstract), latest.step

    def forget_after(self, step: int) -> None:
        """Drops the metrics beyond `step`: a run that goes on from there writes them again."""
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines(keepends=True)
            kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
            write_whole(self.metrics, kept.encode(), overwrite=True)

    def save(self, step: int, state: Any) -> None:
        """A checkpoint, and the curve as it stands."""
        self._checkpoints.save(step, state)
        plot(self.path)

    def log(self, **numbers: float | int) -> None:
        """One line of metrics, with the time of day; printed, too."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **numbers})
        print(line, flush=True)
        with self.metrics.open("a") as stream:
            stream.write(line + "\n")


def plot(folder: Path) -> None:
    """`metrics.jsonl` as `curve.png`, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
    axes.set(xlabel="step", ylabel="loss", title=f"FLUX-nano, phase {folder.name}", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "curve.png", dpi=100)
