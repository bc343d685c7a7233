"""How FLUX-nano's networks learn: the recipe of a phase, and one step; the loop is `flux_jax.training.loop`'s.

In: networks, a `Dataset`, a loss and a `Recipe`. Out: the averaged networks, and in the phase's folder what every
training leaves, with `recipe.json`. The same recipe runs on a CPU (data-parallel over its cores) and on GPUs.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.errors import UserError, shortened
from flux_jax.io import reading
from flux_jax.io.atomic import write_whole
from flux_jax.nano.dataset import Dataset
from flux_jax.training import mesh as meshes
from flux_jax.training import optim
from flux_jax.training.loop import CHECKPOINTS, Trainer, last_checkpoint
from flux_jax.training.metrics import Metrics
from flux_jax.training.options import check, option

# (networks, batch, key, constants) -> (what is minimised, what is logged). Hashable: a step is compiled once for each.
Loss = Callable[[Any, dict[str, Array], Array, dict[str, Any]], tuple[Float[Array, ""], Float[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a phase does; every field is a flag of `python -m flux_jax.nano.train`."""

    steps: int = option(8000, "steps of the phase", least=1)
    batch: int = option(64, "examples of a step", least=1)
    learning_rate: float = option(2e-3, "between its rise and its fall", least=0)
    warmup: int = option(200, "first steps, over which it rises", least=0)
    decay: float = option(0.3, "last share of the steps, over which it falls to zero", least=0, most=1)
    ema: float = option(0.999, "decay of the running mean of the weights, which is what is kept", least=0, most=1)
    dropout: float = option(0.1, "share of empty captions in phase flow", least=0, most=1)
    layout_weight: float = option(0.2, "of the layout head's loss beside the velocity's", least=0)
    examples: int = option(32_768, "scenes that are drawn, once", least=1)
    guidance_max: float = option(6.0, "phase guidance draws its guidance from 1 to this", least=1)
    seed: int = option(0, "of scenes, batches and weights", least=0, most=2**32 - 1)

    def __post_init__(self):
        check(self)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices inside the blocks, Adam for the rest; warm-up, constant, then linear decay to zero."""
    decay = int(recipe.steps * recipe.decay)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, decay),
        ],
        [recipe.warmup, recipe.steps - decay],
    )
    return optim.clipped_muon(schedule, lambda leaf: optim.STACKED_MATRIX if leaf.ndim == 3 else None)


@functools.partial(jax.jit, static_argnames=("graph", "loss", "recipe"), donate_argnames="state")
def update(graph, loss: Loss, recipe: Recipe, state: dict, batch: dict, step: Int[Array, ""], constants: dict):
    """(state, {"loss": what the loss logs, "gradient_norm"}) after one step; every random draw is a function of (seed,
    step)."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), step)

    def minimised(params):
        return loss(nnx.merge(graph, params), batch, key, constants)

    (_, value), gradient = jax.value_and_grad(minimised, has_aux=True)(state["params"])
    changes, optimizer_state = optim.descend(optimizer(recipe), gradient, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], changes)
    mean = optim.running_mean(state["ema"], params, recipe.ema, step)
    state = {"params": params, "ema": mean, "optimizer": optimizer_state}
    return state, {"loss": value, "gradient_norm": optax.tree.norm(gradient)}


def init_state(recipe: Recipe, networks: nnx.Module) -> tuple[Any, dict[str, Any]]:
    """(graph, the state before the first step, on all devices)"""
    graph, initial = nnx.split(networks)
    params, ema = (jax.tree.map(jnp.copy, nnx.to_pure_dict(initial)) for _ in range(2))  # updates donate them
    state = {"params": params, "ema": ema, "optimizer": jax.jit(optimizer(recipe).init)(params)}
    return graph, jax.device_put(state, meshes.whole(meshes.grid(jax.device_count())))


def keep(path: Path, recipe: dict[str, Any]) -> None:
    """Writes down how a training is done, where it begins. UserError where one that was done otherwise has begun."""
    if path.exists():
        before = reading.read_object(path, remedy=f"delete {path.parent} to train anew")
        other = {key: before.get(key) for key, value in recipe.items() if before.get(key) != value}
        if other and (path.parent / CHECKPOINTS).exists():
            begun = ", ".join(f'{key}="{shortened(value, quote=False)}"' for key, value in other.items())
            raise UserError(
                f"{path.parent} holds a training that was begun with {begun}: give the same again, or delete it."
            )
    write_whole(path, (json.dumps(recipe, indent=1) + "\n").encode(), overwrite=True)


def averaged(folder: Path, networks: nnx.Module) -> nnx.Module | None:
    """The averaged networks as the phase in `folder` saved them last; None where it has saved none. networks: of the
    same kind."""
    graph, state = init_state(Recipe(), networks)
    state, step = last_checkpoint(folder, state)
    return nnx.merge(graph, state["ema"]) if step else None


def train(
    folder: Path,
    recipe: Recipe,
    networks: nnx.Module,
    dataset: Dataset,
    loss: Loss,
    constants: dict[str, Any] | None = None,
    *,
    save_every: int = 500,
    log_every: int = 50,
) -> Any:
    """Trains to the recipe's last step, and returns the averaged networks. networks: float32, where a training that has
    not begun begins; constants: arrays that the loss needs at each step. UserError when a loss is not finite, or the
    folder holds a training by another recipe."""
    mesh = meshes.make(None, {"batch": recipe.batch})
    keep(folder / "recipe.json", dataclasses.asdict(recipe))
    graph, state = init_state(recipe, networks)
    constants = jax.device_put(constants or {}, meshes.whole(mesh))
    rows = meshes.by_row(mesh)
    state = Trainer(folder, folder.name, Metrics(folder), save_every, log_every).run(
        state,
        lambda state, batch, step: update(graph, loss, recipe, state, batch, step, constants),
        lambda step, _: jax.device_put(dataset.batch(recipe.seed, step, recipe.batch), rows),
        recipe.steps,
    )
    return nnx.merge(graph, state["ema"])
