"""How a student's parameters learn: rates by kind of leaf, one step, and what is done where a step is not finite.

In: parameters (a dict tree of float arrays), a loss (params, batch, constants) -> scalar that is equal to any other
that computes the same, and `batches(step, mean)`, a function of the step and, at steps named in `stops`, of the running
mean of the parameters so far (it must not keep that: the next step uses its memory). Out: the last running mean. The
loop around the steps is `flux_jax.training.loop`'s.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flux_jax.distill.options import Options
from flux_jax.distill.student import LARGEST
from flux_jax.training import mesh as meshes
from flux_jax.training import optim
from flux_jax.training.loop import Trainer

Batches = Callable[[int, Any], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """What `update` needs to know of a fit; see `Options` for the meaning of each."""

    steps: int
    learning_rate: float
    accumulate: int
    seed: int
    optimizer: str
    scale_rate: float
    rest_rate: float
    warmup: float
    decay: float
    decay_power: float
    ema: float

    @classmethod
    def of(cls, options: Options, **own: Any) -> "FitConfig":
        """The options' own numbers, but for `own`."""
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}
        values["rest_rate"] = options.rest_rate if options.train_rest else 0.0
        return cls(**values | own)


def kind(path: tuple) -> str:
    """ "shadow", "scale" or "rest", by the name of a leaf."""
    return {"shadow": "shadow", "log_scale": "scale"}.get(path[-1].key, "rest")


def optimizer(plan: FitConfig) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) or Muon (arXiv 2502.16982, updates of Adam's size) for shadows, Adam for the rest; each
    kind at its own rate."""
    share = optim.share_of_rate(plan.steps, plan.warmup, plan.decay, plan.decay_power)

    def adam(rate: float):
        return optax.adam(lambda step: rate * share(step), b1=0.9, b2=0.98, eps=1e-12)

    def muon(rate: float):
        return optax.contrib.muon(
            lambda step: rate * share(step),
            consistent_rms=1.0,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: optim.STACKED_MATRIX, params),
        )

    return optax.partition(
        {
            "shadow": (adam if plan.optimizer == "adam" else muon)(plan.learning_rate),
            "scale": adam(plan.learning_rate * plan.scale_rate),
            "rest": adam(plan.learning_rate * plan.rest_rate) if plan.rest_rate else optax.set_to_zero(),
        },
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: kind(path), params),
    )


def stochastic_round(x: Float[Array, "*s"], key: Array) -> Float[Array, "*s"]:
    """float32 to bfloat16, up or down with the probabilities that make the expectation x: the 16 bits that are cut off
    are first added to as many random ones."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (jax.random.bits(key, x.shape, jnp.uint32) >> 16)
    high = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return high.astype(jnp.bfloat16)


def store_as(like: Any, wide: Any, key: Array) -> Any:
    """float32 leaves in the dtypes of `like`; bfloat16 by stochastic rounding."""
    leaves, structure = jax.tree.flatten(wide)
    stored = [
        stochastic_round(x, jax.random.fold_in(key, i)) if old.dtype == jnp.bfloat16 else x
        for i, (x, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, stored)


def to_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def gradients(loss, plan: FitConfig, params: Any, batch: Any, constants: Any):
    """(loss, gradient) in float32, the means over `plan.accumulate` microbatches of the batch."""
    if plan.accumulate == 1:
        value, gradient = jax.value_and_grad(loss)(params, batch, constants)
        return value, to_float32(gradient)
    # Microbatch j of m takes rows j, j + m, ...: each device's rows stay where they are.
    microbatches = jax.tree.map(lambda x: x.reshape(-1, plan.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, microbatch):
        value, gradient = jax.value_and_grad(loss)(params, microbatch, constants)
        return jax.tree.map(jnp.add, total, (value, to_float32(gradient))), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, to_float32(params)))
    total, _ = jax.lax.scan(add, zero, microbatches)
    return jax.tree.map(lambda x: x / plan.accumulate, total)


def clip_shadows(params: Any) -> Any:
    """Shadows beyond the largest come back to it."""

    def clip(path, x):
        return jnp.clip(x, -LARGEST, LARGEST) if kind(path) == "shadow" else x

    return jax.tree_util.tree_map_with_path(clip, params)


def keep_if(good: Bool[Array, ""], new: dict, old: dict) -> dict:
    """`new`, or `old` with one more in its count `skipped`.

    Not `optax.apply_if_finite`: that looks at the gradient alone, leaves the running mean to the caller, and gives in
    after so many bad steps one after the other. Here nothing changes but the count, and when it is large the loop ends.
    """
    kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    return kept | {"skipped": old["skipped"] + (~good).astype(jnp.int32)}


@functools.partial(jax.jit, static_argnames=("loss", "plan", "mesh"), donate_argnames="state")
def update(loss, plan: FitConfig, mesh: Mesh, state: dict, batch: dict, constants: Any, step: Int[Array, ""]):
    """(state, {"loss", "gradient_norm", "skipped"}) after one step. A loss or gradient that is not finite changes
    nothing but the count `state["skipped"]`; every random draw is a function of (seed, step)."""
    value, gradient = gradients(loss, plan, state["params"], batch, constants)
    gradient = meshes.place_parameters(mesh, gradient)
    norm = optax.tree.norm(gradient)
    params, mean = to_float32(state["params"]), to_float32(state["ema"])
    changes, optimizer_state = optim.descend(optimizer(plan), gradient, state["optimizer"], params)
    params = clip_shadows(jax.tree.map(jnp.add, params, changes))
    mean = optim.running_mean(mean, params, plan.ema, step)
    key = jax.random.fold_in(jax.random.key(plan.seed), step)
    new = state | {
        "params": store_as(state["params"], params, jax.random.fold_in(key, 0)),
        "ema": store_as(state["ema"], mean, jax.random.fold_in(key, 1)),
        "optimizer": optimizer_state,
    }
    kept = meshes.place_parameters(mesh, keep_if(jnp.isfinite(value) & jnp.isfinite(norm), new, state))
    return kept, {"loss": value, "gradient_norm": norm, "skipped": kept["skipped"]}


@functools.partial(jax.jit, static_argnames=("plan", "mesh"))
def init_state(plan: FitConfig, mesh: Mesh, params: Any) -> dict:
    """The state before the first step."""
    state = {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "optimizer": optimizer(plan).init(to_float32(params)),
        "skipped": jnp.int32(0),
    }
    return meshes.place_parameters(mesh, state)


def fit(
    trainer: Trainer,
    plan: FitConfig,
    mesh: Mesh,
    loss: Any,
    params: Any,
    batches: Batches,
    constants: Any,
    stops: Sequence[int] = (),
) -> Any:
    """Trains `params` (global arrays) and returns their running mean, in the same dtypes; see the module's docstring.
    stops: steps before which there is always a checkpoint."""
    rows = meshes.by_row(mesh)
    state = trainer.run(
        init_state(plan, mesh, params),
        lambda state, batch, step: update(loss, plan, mesh, state, batch, constants, step),
        lambda step, state: meshes.put(batches(step, state["ema"]), rows),
        plan.steps,
        stops,
    )
    return state["ema"]
