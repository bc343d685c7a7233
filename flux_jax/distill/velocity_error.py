"""How near a student's velocities and latents are to its teacher's.

In: transformers, noise with encoded prompts. Out: for each student the relative squared error of the velocity at each
noise level of the teacher's own trajectories, and the peak signal-to-noise ratio of the latents that it samples itself,
from the same noise, against the teacher's: 10 log10(p^2 / mean squared difference), p the range of the teacher's
latents.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flux_jax.distill.trajectories import rollout


def compare(
    teacher: Any, students: dict[str, Any], chunks: list[tuple], sigmas: Any, rope: Any, guidance: float
) -> dict:
    """Name -> {"velocity": relative squared error by step, "psnr": decibel} of each student (a transformer). chunks:
    (noise [b, i, c], text [b, t, d], pooled [b, p]) of some pictures each."""

    @functools.partial(jax.jit, static_argnames="steps")
    def velocities(transformer, x, text, pooled, sigmas, rope, steps):
        """x [b, s, i, c] -> the velocity at each point, float32."""

        def one(_, points):
            x, sigma = points
            v = transformer.velocity(x, jnp.full(x.shape[:1], sigma), jnp.float32(guidance), text, pooled, rope)
            return None, v.astype(jnp.float32)

        return jnp.moveaxis(jax.lax.scan(one, None, (jnp.moveaxis(x, 1, 0), sigmas[:steps]))[1], 0, 1)

    def end(points) -> np.ndarray:
        x, v = (np.asarray(a, np.float32) for a in points)
        return x[:, -1] + (sigmas[-1] - sigmas[-2]) * v[:, -1]

    steps = len(sigmas) - 1
    wrong = {name: np.zeros(steps) for name in students}
    differences: dict[str, list] = {name: [] for name in students}
    power, ends = np.zeros(steps), []
    for noise, text, pooled in chunks:
        given = (text, pooled, np.float32(guidance), sigmas, rope)
        theirs = rollout(teacher, noise, *given, False)
        ends.append(end(theirs))
        expected = np.asarray(theirs[1], np.float64)
        power += np.square(expected).sum((0, 2, 3))
        for name, student in students.items():
            found = np.asarray(velocities(student, theirs[0], text, pooled, sigmas, rope, steps), np.float64)
            wrong[name] += np.square(found - expected).sum((0, 2, 3))
            differences[name].append(end(rollout(student, noise, *given, False)) - ends[-1])
    latents = np.concatenate(ends)
    span = float(latents.max() - latents.min())
    return {
        name: {
            "velocity": [float(e / p) for e, p in zip(wrong[name], power, strict=True)],
            "velocity_mean": float(wrong[name].sum() / power.sum()),
            "psnr": 10 * math.log10(span**2 / max(1e-12, float(np.square(np.concatenate(d)).mean()))),
        }
        for name, d in differences.items()
    }
