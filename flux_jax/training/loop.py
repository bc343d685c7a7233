"""The one training loop: checkpoints, metrics, progress, and going on after a kill.

In: a state (a tree of arrays on their devices), `update(state, batch, step)` -> (state, numbers of the step, "loss"
among them), and `batches(step, state)`, both functions of their arguments alone. Out: the state after the last step; on
the way, in a folder, Orbax checkpoints (the last two) and lines of `Metrics`. Killed at any moment, the same call goes
on from the last checkpoint and ends with the same bits.
"""

import dataclasses
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flux_jax.checkpoints.silence import silenced
from flux_jax.errors import UserError
from flux_jax.io import places
from flux_jax.runtime import memory
from flux_jax.training.metrics import Metrics

CHECKPOINTS = "checkpoints"  # in a training's folder
PLOT_SECONDS = 60  # between curves, which take half a second each
Update = Callable[[Any, Any, np.int32], tuple[Any, dict[str, jax.Array]]]
Batches = Callable[[int, Any], Any]


def last_checkpoint(folder: Path, state: Any) -> tuple[Any, int]:
    """(state, step) as a training in `folder` saved them last, each array placed as in `state`; (state, 0) where none
    has saved. UserError where that is damaged."""
    if not (folder / CHECKPOINTS).exists():
        return state, 0
    with _checkpointer(folder) as checkpoints:
        return _restore(checkpoints, folder, state)


def _checkpointer(folder: Path, **options: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    last_two = ocp.training.preservation_policies.LatestN(2)
    with silenced():
        return ocp.training.Checkpointer((folder / CHECKPOINTS).absolute(), preservation_policy=last_two, **options)


def _restore(checkpoints: Any, folder: Path, state: Any) -> tuple[Any, int]:
    if not (latest := checkpoints.latest):
        return state, 0
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    try:
        with silenced():
            return checkpoints.load(latest, abstract), latest.step
    except Exception as error:  # Orbax and TensorStore raise many kinds, and few that say what is wrong
        if memory.is_exhausted(error):
            raise
        raise UserError(
            f"{folder / CHECKPOINTS / str(latest.step)} is damaged, or of another training: delete it and "
            "run the training again, which goes on from the checkpoint before."
        ) from error


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The loop of one phase: its checkpoints are in `folder`, its lines in `metrics` are named `phase`. max_skipped: as
    many bad steps, whose loss or gradient is not finite, do not end it; for an update that leaves these out, and counts
    them in its number "skipped"."""

    folder: Path
    phase: str
    metrics: Metrics
    save_every: int
    log_every: int
    max_skipped: int = 0

    def run(self, state: Any, update: Update, batches: Batches, steps: int, stops: Container[int] = ()) -> Any:
        """The state after `steps` steps; `state` is the one before the first, and may be donated. stops: steps before
        which there is always a checkpoint, for batches that depend on the state. UserError at the first line with too
        many bad steps, where a checkpoint is damaged, and where none can be written."""
        places.check_writable(self.folder / CHECKPOINTS, folder=True)
        with _checkpointer(self.folder, cleanup_tmp_directories=True) as checkpoints:
            state, step = _restore(checkpoints, self.folder, state)
            self.metrics.forget_after(self.phase, step)
            recent, start, plotted = [], time.perf_counter(), time.perf_counter()
            hidden = jax.process_index() > 0
            with tqdm(total=steps, initial=step, desc=self.phase, mininterval=2, disable=hidden) as bar:
                while step < steps:
                    state, numbers = update(state, batches(step, state), np.int32(step))
                    recent.append(numbers)
                    step += 1
                    bar.update()
                    last = step == steps
                    if step % self.log_every == 0 or last:
                        bar.set_postfix(self._log(step, recent, start))
                        recent, start = [], time.perf_counter()
                    if step % self.save_every == 0 or step in stops or last:
                        checkpoints.save(step, state)
                    if last or time.perf_counter() - plotted > PLOT_SECONDS:
                        self.metrics.plot()
                        plotted = time.perf_counter()
        return state

    def _log(self, step: int, recent: list[dict[str, jax.Array]], start: float) -> dict[str, Any]:
        """A line: the mean of the finite losses since the line before, and the last step's other numbers."""
        losses = np.array(jax.device_get([numbers["loss"] for numbers in recent]))
        finite = losses[np.isfinite(losses)]
        others = {name: value.item() for name, value in jax.device_get(recent[-1]).items() if name != "loss"}
        line = {"loss": float(finite.mean()) if len(finite) else float("nan")} | others
        seconds = round((time.perf_counter() - start) / len(recent), 4)
        self.metrics.log(phase=self.phase, step=step, **line, seconds_per_step=seconds)
        if (bad := others.get("skipped", len(losses) - len(finite))) > self.max_skipped:
            raise UserError(
                f"{self.phase}: {bad} of {step} steps had a loss or gradient that is not finite; lower the learning "
                "rate, or look for damaged weights."
            )
        return line
