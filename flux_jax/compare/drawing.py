"""The same noise through two models, one after the other: only one of them is in memory at a time.

In: two `Variant`s, prompts with seeds, how to sample. Out, in a folder: `a/00000.png`, `b/00000.png`, and for each
picture `b/00000.json` with its metrics (`flux_jax.compare.metrics`). The first model's latents wait in `latents/` until
the second has been compared with them. Whatever is there is not made again, so that a killed run goes on.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux_jax.compare import metrics
from flux_jax.compare.networks import Judge
from flux_jax.evaluate.benchmarks import Picture
from flux_jax.evaluate.models import Variant
from flux_jax.evaluate.render_prompts import recorder
from flux_jax.io import atomic, png


@dataclass(frozen=True)
class ComparisonTask:
    """One prompt and seed, drawn by both models."""

    index: int
    prompt: str
    seed: int

    def picture(self, side: str, out: Path) -> Path:
        return out / side / f"{self.index:05d}.png"

    def latents(self, out: Path) -> Path:
        return out / "latents" / f"{self.index:05d}.npy"

    def result(self, out: Path) -> Path:
        return out / "b" / f"{self.index:05d}.json"


def run(
    tasks: Sequence[ComparisonTask], a: Variant, b: Variant, sampling: dict[str, Any], out: Path
) -> list[dict[str, Any]]:
    """Makes what is missing; returns the pictures' metrics in order. sampling: arguments of the pipeline."""
    todo = [task for task in tasks if not task.result(out).exists()]
    first = [task for task in todo if not (task.latents(out).exists() and task.picture("a", out).exists())]
    for task, latents in _draw(first, a, "a", sampling, out):
        buffer = io.BytesIO()
        np.save(buffer, latents)
        atomic.write_whole(task.latents(out), buffer.getvalue(), overwrite=True)
    for task, latents in _draw(todo, b, "b", sampling, out):
        row: dict[str, Any] = {"index": task.index, "prompt": task.prompt, "seed": task.seed}
        row |= metrics.picture_metrics(*(pixels(task.picture(side, out)) for side in "ab"))
        row["latent_errors"] = metrics.latent_errors(np.load(task.latents(out)), latents)
        atomic.write_whole(task.result(out), json.dumps(row).encode(), overwrite=True)
        task.latents(out).unlink()
    shutil.rmtree(out / "latents", ignore_errors=True)
    return [json.loads(task.result(out).read_text("utf-8")) for task in tasks]


def judged(
    rows: Sequence[dict[str, Any]], tasks: Sequence[ComparisonTask], out: Path, judges: Sequence[Judge]
) -> list[dict[str, Any]]:
    """The rows with what networks say of their pictures; only one network is in memory at a time."""
    import jax

    rows = [dict(row) for row in rows]
    for start in judges:
        measure = start()
        with jax.default_matmul_precision("float32"):  # a GPU's default would round the factors
            for place, (row, task) in enumerate(zip(tqdm(rows, desc="judge", mininterval=2), tasks, strict=True)):
                row |= measure(place, *(pixels(task.picture(side, out)) for side in "ab"))
    return rows


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def _draw(
    tasks: Sequence[ComparisonTask], variant: Variant, side: str, sampling: dict[str, Any], out: Path
) -> Iterator[tuple[ComparisonTask, np.ndarray]]:
    """Draws, writes the picture, yields (task, latents float32 [steps, i, c])."""
    if not tasks:
        return
    import jax

    with variant.tracing():
        pipe = variant.load()
        record = recorder(variant, sampling, jax.devices()[0])
        for task in tqdm(tasks, desc=f"{side}: {variant}", unit="picture", mininterval=2):
            path: list[np.ndarray] = []
            output = pipe(task.prompt, seed=task.seed, callback_on_step_end=_keeper(path), **sampling)
            entry = record(Picture(task.prompt, task.seed, Path()), output.images[0])
            png.write_png(task.picture(side, out), output.images[0], entry, overwrite=True)
            yield task, np.concatenate(path)


def _keeper(path: list[np.ndarray]) -> Callable[..., None]:
    def keep(pipe, step, timestep, tensors) -> None:
        path.append(tensors["latents"])

    return keep
