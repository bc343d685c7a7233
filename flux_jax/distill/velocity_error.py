"""How near a student's velocities and latents are to its teacher's.

In: transformers, noise with encoded prompts. Out: for each student the relative squared error of the velocity at each
noise level of the teacher's own trajectories, and the peak signal-to-noise ratio of the latents that it samples itself,
from the same noise, against the teacher's: 10 log10(p^2 / mean squared difference), p the range of the teacher's
latents.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flux_jax.distill.trajectories import rollout
from flux_jax.models.transformer import Transformer


@jax.jit
def velocities(
    transformer: Transformer,
    x: Float[Array, "b s i c"],
    text: Float[Array, "b t d"],
    pooled: Float[Array, "b p"],
    guidance: Float[Array, ""],
    sigmas: Float[Array, " levels"],
    rope: Float[Array, "2 n half"],
) -> Float[Array, "b s i c"]:
    """The transformer's velocity at each of the points, float32."""

    def one(_, points):
        x, sigma = points
        v = transformer.velocity(x, jnp.full(x.shape[:1], sigma), guidance, text, pooled, rope)
        return None, v.astype(jnp.float32)

    return jnp.moveaxis(jax.lax.scan(one, None, (jnp.moveaxis(x, 1, 0), sigmas[:-1]))[1], 0, 1)


def compare(
    teacher: Any,
    students: Mapping[str, Any],
    chunks: Sequence[tuple],
    sigmas: np.ndarray,
    rope: Any,
    guidance: float,
) -> dict[str, dict[str, Any]]:
    """Name -> {"velocity": relative squared error by step, "psnr": decibel} of each student; transformers all. chunks:
    (noise [b, i, c], text [b, t, d], pooled [b, p]) of some pictures each."""

    def end(points: tuple[Any, Any]) -> np.ndarray:
        """The latents behind the last step."""
        x, v = (np.asarray(a, np.float32) for a in points)
        return x[:, -1] + (sigmas[-1] - sigmas[-2]) * v[:, -1]

    power, latents = [], []
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in students}  # of each chunk
    for noise, text, pooled in chunks:
        given = (text, pooled, np.float32(guidance), sigmas, rope)
        theirs = rollout(teacher, noise, *given, False)
        expected = np.asarray(theirs[1], np.float64)
        power.append(np.square(expected).sum((0, 2, 3)))
        latents.append(end(theirs))
        for name, student in students.items():
            error = np.asarray(velocities(student, theirs[0], *given), np.float64) - expected
            difference = end(rollout(student, noise, *given, False)) - latents[-1]
            found[name].append((np.square(error).sum((0, 2, 3)), np.square(difference).mean((1, 2))))
    span, whole, results = float(np.ptp(np.concatenate(latents))), np.sum(power, 0), {}
    for name, of_chunks in found.items():
        errors, squares = zip(*of_chunks, strict=True)
        error, square = np.sum(errors, 0), max(1e-12, float(np.concatenate(squares).mean()))
        results[name] = {
            "velocity": (error / whole).tolist(),
            "velocity_mean": float(error.sum() / whole.sum()),
            "psnr": 10 * math.log10(span**2 / square),
        }
    return results
