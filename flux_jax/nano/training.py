"""The training loop that FLUX-nano's phases share.

In: parameters, a `Dataset`, a loss and a `Recipe`. Out: in a folder, Orbax checkpoints (killed at any moment, the same
call goes on), `metrics.jsonl`, `curve.png` and `recipe.json`; and the averaged parameters. The same recipe runs on a
CPU (data-parallel over its cores) and on GPUs.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from flux_jax.io.atomic import write_whole
from flux_jax.nano.dataset import Dataset
from flux_jax.nano.runs import RunDirectory

# (networks, batch, key, constants) -> (what is minimised, what is logged). Hashable: a step is compiled once for each.
Loss = Callable[[Any, dict[str, Array], Array, dict[str, Any]], tuple[Float[Array, ""], Float[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a phase does; every field is a flag of `python -m flux_jax.nano.train`."""

    steps: int = 8000
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.3  # the last share of the steps, over which the learning rate falls to zero
    ema: float = 0.999
    dropout: float = 0.1  # share of empty captions in phase `flow`
    layout_weight: float = 0.2  # of the layout head's loss beside the velocity's
    examples: int = 32_768
    guidance_max: float = 6.0  # phase `guidance` draws g from [1, guidance_max]
    seed: int = 0


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices inside the blocks (arXiv 2502.16982, update sizes matched to AdamW's), Adam for the rest,
    behind a clip of the gradient's norm; warm-up, constant, then linear decay to zero."""
    decay = int(recipe.steps * recipe.decay)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, decay),
        ],
        [recipe.warmup, recipe.steps - decay],
    )
    stacked_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    def dimensions(params):
        return jax.tree.map(lambda leaf: stacked_matrix if leaf.ndim == 3 else None, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(schedule, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions),
    )


@functools.partial(jax.jit, static_argnames=("graph", "loss", "recipe"), donate_argnames="state")
def update(graph, loss: Loss, recipe: Recipe, state: dict, batch: dict, step: Int[Array, ""], constants: dict):
    """(state, what the loss logs, gradient norm) after one step; every random draw is a function of (seed, step)."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), step)

    def minimised(params):
        return loss(nnx.merge(graph, params), batch, key, constants)

    (_, value), gradient = jax.value_and_grad(minimised, has_aux=True)(state["params"])
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, optimizer_state = optimizer(recipe).update(gradient, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    decay = jnp.minimum(recipe.ema, (1 + step) / (10 + step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params)
    return {"params": params, "ema": ema, "optimizer": optimizer_state}, value, optax.tree.norm(gradient)


class Trainer:
    """One phase of training: state on the devices, checkpoints and metrics in `folder`."""

    def __init__(self, folder: Path, recipe: Recipe, networks: nnx.Module):
        """networks: float32, where a run that has not begun begins."""
        self.folder, self.recipe = RunDirectory(folder), recipe
        self.mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.graph, initial = nnx.split(networks)
        params, ema = (jax.tree.map(jnp.copy, nnx.to_pure_dict(initial)) for _ in range(2))  # updates donate them
        state = {"params": params, "ema": ema, "optimizer": jax.jit(optimizer(recipe).init)(params)}
        self.state, self.step = self.folder.restore(jax.device_put(state, self.replicated))

    def averaged(self) -> Any:
        """The networks with the averaged parameters."""
        return nnx.merge(self.graph, self.state["ema"])

    def run(
        self,
        dataset: Dataset,
        loss: Loss,
        constants: dict[str, Any] | None = None,
        save_every: int = 500,
        log_every: int = 50,
    ) -> Any:
        """Train to the recipe's last step; returns `averaged()`. constants: arrays that the loss needs at each step.
        FloatingPointError when the loss is no longer finite."""
        self.folder.forget_after(self.step)
        recipe = json.dumps(dataclasses.asdict(self.recipe), indent=1) + "\n"
        write_whole(self.folder.path / "recipe.json", recipe.encode(), overwrite=True)
        by_example = NamedSharding(self.mesh, PartitionSpec("data"))
        constants = jax.device_put(constants or {}, self.replicated)
        losses, start = [], time.perf_counter()
        while self.step < self.recipe.steps:
            batch = jax.device_put(dataset.batch(self.recipe.seed, self.step, self.recipe.batch), by_example)
            step = jnp.int32(self.step)
            self.state, value, norm = update(self.graph, loss, self.recipe, self.state, batch, step, constants)
            losses.append(value)
            self.step += 1
            if self.step % log_every == 0:
                mean = float(np.mean(jax.device_get(losses)))
                seconds, losses, start = time.perf_counter() - start, [], time.perf_counter()
                self.folder.log(
                    step=self.step,
                    loss=round(mean, 5),
                    gradient_norm=round(float(norm), 4),
                    samples_per_second=round(log_every * self.recipe.batch / seconds, 1),
                )
                if not np.isfinite(mean):
                    raise FloatingPointError(f"the loss is {mean} at step {self.step}: lower --learning-rate")
            if self.step % save_every == 0 or self.step == self.recipe.steps:
                self.folder.save(self.step, self.state)
        return self.averaged()
