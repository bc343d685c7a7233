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
from tqdm import tqdm

from flux_jax.compare import metrics
from flux_jax.compare.networks import Judge
from flux_jax.evaluate.benchmarks import Picture
from flux_jax.evaluate.models import Variant
from flux_jax.evaluate.render_prompts import recorder
from flux_jax.io import atomic, locks, png, reading
from flux_jax.io.fields import Types, wrong_fields
from flux_jax.io.pictures import AGAIN, read_picture

MEASURED: Types = {"psnr": int | float | None, "ssim": int | float | None, "largest": int, "apart": int | float,
                   "same": bool}  # fmt: skip


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

    def files(self, out: Path) -> list[Path]:
        """What there is of it in the end."""
        return [self.picture("a", out), self.picture("b", out), self.result(out)]


def run(
    tasks: Sequence[ComparisonTask], a: Variant, b: Variant, sampling: dict[str, Any], out: Path
) -> list[dict[str, Any]]:
    """Makes what is missing; returns the pictures' metrics in order. sampling: arguments of the pipeline."""
    todo = [task for task in tasks if not all(file.exists() for file in task.files(out))]
    first = [task for task in todo if not (task.latents(out).exists() and task.picture("a", out).exists())]
    for task, latents in _draw(first, a, "a", sampling, out):
        buffer = io.BytesIO()
        np.save(buffer, latents)
        atomic.write_whole(task.latents(out), buffer.getvalue(), overwrite=True)
    for task, latents in _draw(todo, b, "b", sampling, out):
        row: dict[str, Any] = {"index": task.index, "prompt": task.prompt, "seed": task.seed}
        row |= metrics.picture_metrics(*pair(task, out))
        row["latent_errors"] = metrics.latent_errors(read_latents(task.latents(out), latents), latents)
        atomic.write_whole(task.result(out), json.dumps(row).encode(), overwrite=True)
        task.latents(out).unlink()
    shutil.rmtree(out / "latents", ignore_errors=True)
    locks.sweep(out)
    return [read_result(task, out, sampling["num_inference_steps"]) for task in tasks]


def read_result(task: ComparisonTask, out: Path, steps: int) -> dict[str, Any]:
    """What `run` wrote of a picture. UserError where it is something else."""
    path = task.result(out)
    row = reading.read_object(path, remedy=AGAIN)
    written = {"index": task.index, "prompt": task.prompt, "seed": task.seed}
    errors = row.get("latent_errors")
    right = isinstance(errors, list) and len(errors) == steps and all(isinstance(each, int | float) for each in errors)
    right = right and MEASURED.keys() <= row.keys() and not wrong_fields(row, MEASURED)
    if not right or any(row.get(key) != value for key, value in written.items()):
        raise reading.unreadable(path, "it is not what was written", AGAIN)
    return row


def read_latents(path: Path, like: np.ndarray) -> np.ndarray:
    """What waited for the second model, in the shape of its own. UserError where it is something else."""
    data = reading.read_bytes(path, most=2 * like.nbytes + 4096, remedy=AGAIN)
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        if found.shape != like.shape or found.dtype != like.dtype:
            raise ValueError(f"it is {found.dtype} {found.shape}")
    except Exception as error:  # damage makes numpy raise nearly anything
        raise reading.unreadable(path, "it is not what was written", AGAIN) from error
    return found


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
                row |= measure(place, *pair(task, out))
    return rows


def pair(task: ComparisonTask, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures, uint8 [h, w, 3]. UserError where one is damaged, or of another size than the other."""
    first = read_picture(task.picture("a", out))
    return np.asarray(first), np.asarray(read_picture(task.picture("b", out), first.size))


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
