"""Sampling trajectories: where the student learns, and what it learns there.

In: prompts, a seed, the teacher with its schedule and guidance. Out: for trajectory j, all its points (x_t, velocity)
and its text, in chunks on disk (float16). Trajectory j depends on (seed, j) alone, its prompt too; a chunk is whole or
not there, so that a killed run goes on with the next one. A batch of points depends on (seed, phase, step) alone.

What a point holds is the rounded x_t and the teacher's velocity at just that x_t. From one point to the next leads the
velocity of the behaviour model: the teacher itself, or, in an on-policy rollout, the student, which meets points beside
the teacher's way, and learns there what brings it back (DAgger, arXiv 1011.0686). With `points` = "noise" x_t is pure
noise at every level: what is known not to work, kept for the ablation.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt
from tqdm import tqdm

from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.distill import memmap_store
from flux_jax.distill.run_context import RunContext
from flux_jax.errors import UserError
from flux_jax.models.transformer import Transformer
from flux_jax.sampling import programs
from flux_jax.sampling.schedule import initial_noise, pack_latents
from flux_jax.training import mesh as meshes

STORED = np.float16
ARRAYS = ("x", "velocity", "text", "pooled")  # of a chunk


def order(prompts: list[str], seed: int, count: int) -> list[str]:
    """The prompts of `count` trajectories: all of them in a random order, again and again."""
    chosen = np.random.default_rng((seed, len(prompts))).permutation(len(prompts))
    return [prompts[chosen[j % len(prompts)]] for j in range(count)]


def encode_each(
    t5: nnx.Module, clip: nnx.Module, tokenizers: Tokenizers, prompts: Iterable[str]
) -> list[tuple[jax.Array, jax.Array]]:
    """(text [1, t, d], pooled [1, p]) of each prompt as the pipeline encodes it: alone."""
    return [programs.encode(t5, clip, tokenizers.t5([prompt]), tokenizers.clip([prompt])) for prompt in prompts]


@functools.partial(jax.jit, static_argnames=("rows", "columns", "channels"))
def noises(
    seed: UInt[Array, ""], indices: Int[Array, " b"], rows: int, columns: int, channels: int
) -> Float[Array, "b i c"]:
    """Each trajectory's noise, by (seed, index); channels of a latent."""
    key = jax.random.key(seed)

    def one(index):
        own = jax.random.bits(jax.random.fold_in(key, index), (), jnp.uint32)
        return initial_noise(own, 2 * rows, 2 * columns, channels)

    return pack_latents(jax.vmap(one)(indices))


@functools.partial(jax.jit, static_argnames="noisy")
def rollout(
    transformer: Transformer,
    noise: Float[Array, "b i c"],
    text: Float[Array, "b t d"],
    pooled: Float[Array, "b p"],
    guidance: Float[Array, ""],
    sigmas: Float[Array, " levels"],
    rope: Float[Array, "2 n half"],
    noisy: bool,
    behaviour: Transformer | None = None,
) -> tuple[Float[Array, "b s i c"], Float[Array, "b s i c"]]:
    """All points of a batch of trajectories: x_t and the transformer's velocity there, float16. behaviour:
    the model whose velocity leads from one point to the next; the transformer itself, where there is none."""
    batch = len(noise)

    def velocity(model, x, now):
        return model.velocity(x, jnp.full((batch,), now), guidance, text, pooled, rope).astype(STORED)

    def body(x, levels):
        now, after, index = levels
        if noisy:
            x = jax.random.permutation(jax.random.fold_in(jax.random.key(0), index), noise, axis=1)
        x = x.astype(STORED)
        v = velocity(transformer, x, now)
        leading = v if behaviour is None else velocity(behaviour, x, now)
        return x.astype(jnp.float32) + (after - now) * leading.astype(jnp.float32), (x, v)

    _, points = jax.lax.scan(body, noise, (sigmas[:-1], sigmas[1:], jnp.arange(len(sigmas) - 1)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), points)


class Trajectories:
    """`count` trajectories of a workspace, read from its folder."""

    def __init__(self, work: RunContext, folder: Path, count: int, chunk: int):
        self.sigmas, self.count, self.chunk, self.steps = work.sigmas, count, chunk, work.steps
        self._chunks = [memmap_store.open_store(path, *ARRAYS) for path in chunk_paths(folder, count, chunk)]

    def points(self, rows: np.ndarray, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Point steps[k] of trajectory rows[k], for each k: x and velocity [m, i, c], t [m], text, pooled; float32."""
        where = [
            (self._chunks[row // self.chunk], row % self.chunk, step) for row, step in zip(rows, steps, strict=True)
        ]
        return {
            "x": np.stack([c["x"][row, step] for c, row, step in where]).astype(np.float32),
            "velocity": np.stack([c["velocity"][row, step] for c, row, step in where]).astype(np.float32),
            "text": np.stack([c["text"][row] for c, row, _ in where]).astype(np.float32),
            "pooled": np.stack([c["pooled"][row] for c, row, _ in where]).astype(np.float32),
            "t": self.sigmas[steps],
        }

    def draw(self, seed: int, phase: int, step: int, size: int, shares: np.ndarray | None) -> tuple[Any, Any]:
        """Rows and steps of `size` random points. shares [steps]: how often each step is drawn (None: alike)."""
        rng = np.random.default_rng((seed, phase, step))
        return rng.integers(0, self.count, size), rng.choice(self.steps, size, p=shares)


def chunk_paths(folder: Path, count: int, chunk: int) -> list[Path]:
    return [folder / f"{start:06d}" for start in range(0, count, chunk)]


def load_or_make(
    work: RunContext, name: str, prompts: list[str], count: int, *, first: int = 0, behaviour: Transformer | None = None
) -> Trajectories:
    """The trajectories first, first + 1, ... in the run's folder `name`, after making those that are not there; led
    by the behaviour model, where there is one. UserError where the teacher's latents or texts leave float16."""
    folder, chunk = work.folder / name, work.options.block_batch
    paths = chunk_paths(folder, count, chunk)
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    if missing:
        apart = name == "held_out"  # measured on what is sampled, whatever was trained on
        maker = TrajectorySampler(
            work, 2 * work.options.seed + apart, work.options.points == "noise" and not apart, behaviour
        )
        texts = order(prompts, work.options.seed, first + count)[first:]
        done, hidden = len(paths) - len(missing), jax.process_index() > 0
        for i in tqdm(missing, desc=name, initial=done, total=len(paths), mininterval=2, disable=hidden):
            arrays = maker.chunk(texts[i * chunk : (i + 1) * chunk], first + i * chunk, chunk)
            if bad := [key for key, value in arrays.items() if not np.isfinite(value).all()]:
                raise UserError(
                    f"Trajectories from {i * chunk} on: the teacher's {bad[0]} is not finite in float16; its weights"
                    ' may be damaged, or try dtype="float32".'
                )
            memmap_store.save(paths[i], arrays)
    return Trajectories(work, folder, count, chunk)


class TrajectorySampler:
    """The teacher with its encoders, ready to sample."""

    def __init__(self, work: RunContext, seed: int, noisy: bool = False, behaviour: Transformer | None = None):
        self.work, self.seed, self.noisy, self.behaviour = work, np.uint32(seed % 2**32), noisy, behaviour
        self.tokenizers = Tokenizers.load(work.teacher.tokenizers, work.config)
        self.t5, self.clip = (work.teacher.load(component, work.dtype) for component in ("t5", "clip"))
        self.transformer = work.load_teacher()

    def encode(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """text [b, t, d] and pooled [b, p], float16."""
        pairs = encode_each(self.t5, self.clip, self.tokenizers, prompts)
        text, pooled = (np.concatenate([np.asarray(x, STORED) for x in each]) for each in zip(*pairs, strict=True))
        return text, pooled

    def chunk(self, prompts: list[str], start: int, size: int) -> dict[str, np.ndarray]:
        """The arrays of trajectories start, start + 1, ...; the last chunk is filled up, and cut again."""
        work, count = self.work, len(prompts)
        filled = prompts + prompts[-1:] * (size - count)
        text, pooled = self.encode(filled)
        shape = (*work.grid, work.config.transformer.in_channels // 4)
        noise = noises(self.seed, np.arange(start, start + size, dtype=np.int32), *shape)
        inputs = meshes.put(
            (np.asarray(noise), text.astype(work.dtype), pooled.astype(work.dtype)), meshes.by_row(work.mesh)
        )
        scalars = meshes.put((np.float32(work.guidance), work.sigmas), meshes.whole(work.mesh))
        x, v = rollout(self.transformer, *inputs, *scalars, work.rope, self.noisy, self.behaviour)
        x, v = meshes.fetch((x, v))
        return {"x": x[:count], "velocity": v[:count], "text": text[:count], "pooled": pooled[:count]}
