"""One fit: parameters that learn from batches, with checkpoints, metrics and a running mean of the weights.

In: parameters (a dict tree of float arrays), a loss (params, batch, frozen) -> scalar that is equal to any other that
computes the same, and `batches(step, mean)`, a function of the step and, at steps named in `stops`, of the running mean
of the parameters so far (it must not keep that: the next step uses its memory). Out: the last running mean. Killed at
any moment, the same call goes on from the last checkpoint and ends with the same bits.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from flux_jax.distill.options import Options
from flux_jax.distill.student import LARGEST
from flux_jax.errors import UserError
from flux_jax.training import mesh as meshes
from flux_jax.training.metrics import Metrics

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


def schedule(plan: FitConfig) -> Callable[[Any], Any]:
    """Share of the learning rate at a step: rises linearly, stays, falls to zero as a power of what is left."""
    rise, fall = max(1.0, plan.warmup * plan.steps), max(1.0, plan.decay * plan.steps)

    def share(step):
        left = jnp.clip((plan.steps - step) / fall, 0.0, 1.0)
        return jnp.minimum((step + 1) / rise, left**plan.decay_power)

    return share


def optimizer(plan: FitConfig):
    """Adam (arXiv 1412.6980) or Muon (arXiv 2502.16982, updates of Adam's size) for shadows, Adam for the rest; each
    kind at its own rate."""
    import optax

    share = schedule(plan)

    def adam(rate: float):
        return optax.adam(lambda step: rate * share(step), b1=0.9, b2=0.98, eps=1e-12)

    def shadows():
        if plan.optimizer == "adam":
            return adam(plan.learning_rate)
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
        return optax.contrib.muon(
            lambda step: plan.learning_rate * share(step),
            consistent_rms=1.0,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: matrix, params),
        )

    return optax.partition(
        {
            "shadow": shadows(),
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


def gradients(loss, plan: FitConfig, params: Any, batch: Any, frozen: Any):
    """(loss, gradient) in float32, the means over `plan.accumulate` parts of the batch."""
    if plan.accumulate == 1:
        value, gradient = jax.value_and_grad(loss)(params, batch, frozen)
        return value, to_float32(gradient)
    # Part j takes rows j, j + parts, ...: each device's rows stay where they are.
    parts = jax.tree.map(lambda x: x.reshape(-1, plan.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, part):
        value, gradient = jax.value_and_grad(loss)(params, part, frozen)
        return jax.tree.map(jnp.add, total, (value, to_float32(gradient))), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, to_float32(params)))
    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda x: x / plan.accumulate, total)


@functools.partial(jax.jit, static_argnames=("loss", "plan", "mesh"), donate_argnames="state")
def update(loss, plan: FitConfig, mesh: Mesh, state: dict, batch: dict, frozen: Any, step: Int[Array, ""]):
    """(state, loss, gradient norm) after one step. A loss or gradient that is not finite changes nothing but the count
    `state["skipped"]`; every random draw is a function of (seed, step)."""
    import optax

    value, gradient = gradients(loss, plan, state["params"], batch, frozen)
    gradient = meshes.place_parameters(mesh, gradient)
    norm = optax.tree.norm(gradient)
    params, mean = to_float32(state["params"]), to_float32(state["ema"])
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, optimizer_state = optimizer(plan).update(gradient, state["optimizer"], params)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, p, u: jnp.clip(p + u, -LARGEST, LARGEST) if kind(path) == "shadow" else p + u, params, updates
    )
    count = step.astype(jnp.float32)
    decay = jnp.minimum(plan.ema, (1 + count) / (10 + count))  # the first means are of few weights
    mean = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), mean, moved)
    key = jax.random.fold_in(jax.random.key(plan.seed), step)
    new = {
        "params": store_as(state["params"], moved, jax.random.fold_in(key, 0)),
        "ema": store_as(state["ema"], mean, jax.random.fold_in(key, 1)),
        "optimizer": optimizer_state,
        "skipped": state["skipped"],
    }
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
    kept["skipped"] = state["skipped"] + (~good).astype(jnp.int32)
    return meshes.place_parameters(mesh, kept), value, norm


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


@dataclasses.dataclass
class Fit:
    """A fit in its folder: `folder/checkpoints` (Orbax, the last two), and lines in `metrics` named `phase`."""

    folder: Path
    phase: str
    plan: FitConfig
    options: Options
    mesh: Mesh
    metrics: Metrics

    def run(self, loss: Any, params: Any, batches: Batches, frozen: Any, stops: Sequence[int] = ()) -> Any:
        """Fits `params` (global arrays) and returns their running mean, in the same dtypes. stops: steps before which
        there is always a checkpoint. UserError once more than `options.max_skipped` steps were not finite."""
        from orbax.checkpoint import v1 as ocp

        state, step = init_state(self.plan, self.mesh, params), 0
        checkpoints = ocp.training.Checkpointer(
            (self.folder / "checkpoints").absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )
        if latest := checkpoints.latest:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state, step = checkpoints.load(latest, abstract), latest.step
        self.metrics.forget_after(self.phase, step)
        losses, start = [], time.perf_counter()
        bar = tqdm(total=self.plan.steps, initial=step, desc=self.phase, mininterval=2, disable=jax.process_index() > 0)
        with bar:
            while step < self.plan.steps:
                batch = meshes.put(batches(step, state["ema"]), meshes.by_row(self.mesh))
                state, value, norm = update(loss, self.plan, self.mesh, state, batch, frozen, np.int32(step))
                losses.append(value)
                step += 1
                bar.update()
                last = step == self.plan.steps
                if step % self.options.log_every == 0 or last:
                    values = np.array(jax.device_get(losses))
                    mean = float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")
                    skipped, seconds = int(state["skipped"]), time.perf_counter() - start
                    self.metrics.log(
                        phase=self.phase,
                        step=step,
                        loss=mean,
                        gradient_norm=float(norm),
                        skipped=skipped,
                        seconds_per_step=round(seconds / len(losses), 4),
                    )
                    bar.set_postfix(loss=f"{mean:.4g}", skipped=skipped)
                    losses, start = [], time.perf_counter()
                    if skipped > self.options.max_skipped:
                        raise UserError(
                            f"{self.phase}: {skipped} of {step} steps had a loss or gradient that is not finite; lower "
                            "the learning rate, or look for damaged weights in the teacher."
                        )
                if step % self.options.save_every == 0 or step in stops or last:
                    checkpoints.save(step, state)
        checkpoints.close()
        return state["ema"]
