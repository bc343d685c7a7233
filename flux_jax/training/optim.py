"""What the optimizers of all trainings share: rates over the steps, Muon, and the running mean of the weights.

In: the number of steps, rates, trees of weights. Out: optax transformations and schedules, and the mean.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

STACKED_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)  # [..., n, k]


def share_of_rate(steps: int, warmup: float, decay: float, power: float) -> Callable[[Any], Any]:
    """Share of a learning rate at a step: rises linearly over the first share `warmup` of the steps, falls to zero over
    the last share `decay`, as a power of what is left of it. The two may overlap, and the lesser counts: where one
    begins when the other ends, `optax.join_schedules` is enough."""
    rise, fall = max(1.0, warmup * steps), max(1.0, decay * steps)

    def share(step):
        left = jnp.clip((steps - step) / fall, 0.0, 1.0)
        return jnp.minimum((step + 1) / rise, left**power)

    return share


def clipped_muon(rate: Any, dimensions: Callable[[Any], Any], adam_b2: float = 0.999) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982, update sizes matched to AdamW's) for the leaves that `dimensions` says are matrices, Adam
    for the rest (None), behind a clip of the gradient's norm."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            rate,
            consistent_rms=0.2,
            adam_b2=adam_b2,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(dimensions, params),
        ),
    )


def descend(optimizer: optax.GradientTransformation, gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """(what is to be added to the parameters, the optimizer's next state)"""
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        return optimizer.update(gradient, state, params)


def running_mean(mean: Any, params: Any, decay: float, step: Int[Array, ""]) -> Any:
    """The exponential mean of the weights after a step, of float32 trees; the first means are of few weights.

    Not `optax.incremental_update`, which computes a p + (1 - a) e: there a weight that never moves drifts from itself
    by roundings. Here it stays, to the bit."""
    decay_now: Float[Array, ""] = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - decay_now) * (p - e), mean, params)
