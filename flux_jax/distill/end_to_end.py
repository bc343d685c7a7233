"""The whole student: put together from its blocks, taught the teacher's velocity (phase `end_to_end`), and measured.

In: arrays of each block (rounded, or from phase `blockwise`), points of the teacher's trajectories, and of on-policy
rollouts, which the student samples. Out: parameters of the student (a dict tree, cut over the mesh), and its velocity's
mean squared error at each noise level.

The phase ends with steps in which the codes are frozen. Before, shadows come to rest at the thresholds between codes,
where every step flips some, however small it is (arXiv 2203.11086): scales and all other floats learn among noise. With
frozen codes they learn without it.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.distill import memmap_store, student
from flux_jax.distill.blockwise import in_dtype
from flux_jax.distill.options import Options
from flux_jax.distill.run_context import RunContext
from flux_jax.distill.training import FitConfig, fit
from flux_jax.distill.trajectories import Trajectories, load_or_make
from flux_jax.models.params import abstract_component, assemble
from flux_jax.models.transformer import Transformer
from flux_jax.training import mesh as meshes

Read = Callable[[RunContext, list[str]], Mapping[str, np.ndarray]]  # names of the student's arrays -> the arrays
ROLLOUT_ROUNDS = 3  # times that the student samples rollouts, at equal distances, before its codes freeze
UNROLLED = 8  # so many blocks compile in seconds without a scan, and a step then takes a quarter less time on a CPU


def read_rounded(work: RunContext, names: list[str]) -> dict[str, np.ndarray]:
    """The student's arrays as they are before any training: the teacher's weights, rounded."""
    sources = {name: _source(name) for name in names}
    found = work.teacher.read("transformer", sources.values())
    made: dict[str, dict[str, Any]] = {}
    for name, source in sources.items():
        if name != source and source not in made:
            shadow, log_scale = student.initial_shadow(jnp.asarray(found[source]), work.options)
            shadow = shadow.astype(jnp.dtype(work.options.shadow_dtype))
            base = source.removesuffix("weight")
            made[source] = {f"{base}shadow": np.asarray(shadow), f"{base}log_scale": np.asarray(log_scale)}
    return {
        name: found[source].astype(np.float32) if name == source else made[source][name]
        for name, source in sources.items()
    }


def _source(name: str) -> str:
    head, _, last = name.rpartition(".")
    return f"{head}.weight" if last in ("shadow", "log_scale") else name


def read_blockwise(work: RunContext, names: list[str]) -> dict[str, np.ndarray]:
    """The student's arrays as phase `blockwise` left them; what is in no block is the teacher's."""
    arrays, rest = {}, []
    for name in names:
        kind, _, inner = name.partition(".")
        if kind in ("double_blocks", "single_blocks"):
            index, _, inner = inner.partition(".")
            store = memmap_store.open_store(work.folder / "blockwise" / f"{kind}.{index}", inner)
            arrays[name] = np.asarray(store[inner])
        else:
            rest.append(name)
    return arrays | read_rounded(work, rest) if rest else arrays


def build(work: RunContext, read: Read) -> tuple[Any, Any]:
    """(graph, parameters) of the whole student."""
    rows = meshes.by_row(work.mesh)
    change = functools.partial(student.student_of, prefix="", options=work.options, rows=rows)
    module = abstract_component("transformer", work.config, change=change)
    assert isinstance(module, Transformer)
    module.rematerialise = work.options.rematerialise
    module.unroll = len(work.blocks) <= UNROLLED
    arrays = functools.partial(read, work)
    whole = assemble(module, arrays, sharding=lambda _, shape: meshes.parameter(work.mesh, shape))
    graph, state = nnx.split(whole)
    return graph, nnx.to_pure_dict(state)


def velocity(graph: Any, dtype: Any, params: Any, batch: dict, constants: Any) -> Float[Array, "b i c"]:
    """The student's velocity at a batch of points, float32."""
    transformer = nnx.merge(graph, in_dtype(params, dtype))
    x, text, pooled = (batch[name].astype(dtype) for name in ("x", "text", "pooled"))
    v = transformer.velocity(x, batch["t"], constants["guidance"], text, pooled, constants["rope"])
    return v.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class VelocityLoss:
    """Mean squared error of the velocity."""

    graph: Any
    dtype: Any

    def __call__(self, params: Any, batch: dict, constants: Any) -> Float[Array, ""]:
        return jnp.square(velocity(self.graph, self.dtype, params, batch, constants) - batch["velocity"]).mean()


@dataclasses.dataclass(frozen=True)
class FrozenCodesLoss:
    """The same as a function of all parameters but the shadows, which are among the constants."""

    loss: VelocityLoss

    def __call__(self, params: Any, batch: dict, constants: Any) -> Float[Array, ""]:
        return self.loss(combine(constants["shadows"], params), batch, constants)


def partition(params: Any) -> tuple[Any, Any]:
    """(shadows, everything else) of a student's parameters, each a dict tree."""
    shadows, rest = nnx.split_state(nnx.State(params), lambda path, _: path[-1] == "shadow", ...)
    return nnx.to_pure_dict(shadows), nnx.to_pure_dict(rest)


def combine(shadows: Any, rest: Any) -> Any:
    """What `partition` took apart."""
    return nnx.to_pure_dict(nnx.merge_state(nnx.State(shadows), nnx.State(rest)))


@functools.partial(jax.jit, static_argnames=("graph", "dtype"))
def errors(graph, dtype, params: Any, batch: dict, constants: Any) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Of each point: the mean squared error of the velocity, and the mean square of the teacher's."""
    error = jnp.square(velocity(graph, dtype, params, batch, constants) - batch["velocity"]).mean((1, 2))
    return error, jnp.square(batch["velocity"]).mean((1, 2))


def constants_of(work: RunContext) -> dict[str, jax.Array]:
    """What every step of a run needs beside batch and parameters."""
    return {"rope": work.rope, "guidance": meshes.put(np.float32(work.guidance), meshes.whole(work.mesh))}


def measure(work: RunContext, graph: Any, params: Any, held_out: Trajectories) -> dict[str, Any]:
    """The velocity's error on all held-out points: `loss` (mean square), `relative` (over the mean square of the
    teacher's velocity), `by_step` (relative, at each of the schedule's noise levels)."""
    rows, steps = (a.ravel() for a in np.mgrid[: held_out.count, : held_out.steps])
    size, found = work.options.block_batch, []
    constants = constants_of(work)
    for start in range(0, len(rows), size):
        chosen = np.minimum(np.arange(start, start + size), len(rows) - 1)
        batch = meshes.put(held_out.points(rows[chosen], steps[chosen]), meshes.by_row(work.mesh))
        found.append(np.stack(meshes.fetch(errors(graph, work.dtype, params, batch, constants))))
    error, power = (
        np.concatenate(found, 1)[:, : len(rows)].astype(np.float64).reshape(2, held_out.count, held_out.steps)
    )
    return {
        "loss": float(error.mean()),
        "relative": float(error.mean() / power.mean()),
        "by_step": [float(e / p) for e, p in zip(error.mean(0), power.mean(0), strict=True)],
    }


def shares(work: RunContext, by_step: list[float]) -> np.ndarray | None:
    """How often each of a trajectory's points is drawn; see `Options.timesteps`."""
    if work.options.timesteps == "uniform":
        return None
    weights = -np.diff(work.sigmas.astype(np.float64)) if work.options.timesteps == "step" else np.sqrt(by_step)
    return weights / weights.sum()


def train(work: RunContext, graph: Any, params: Any, trajectories: Trajectories, by_step: list[float]) -> Any:
    """Phase `end_to_end`; returns the parameters' running mean."""
    options, constants = work.options, constants_of(work)
    points = BatchSampler(work, graph, trajectories, shares(work, by_step))
    plan = FitConfig.of(options, steps=options.learning_steps)
    trainer = work.trainer(work.folder / "end_to_end", "end_to_end")
    loss = VelocityLoss(graph, work.dtype)
    mean = fit(trainer, plan, work.mesh, loss, params, points, constants, points.starts)
    return freeze_codes(work, mean, loss, points, constants) if options.settle_steps else mean


def freeze_codes(work: RunContext, params: Any, loss: VelocityLoss, points: "BatchSampler", constants: dict) -> Any:
    """The last steps of the phase: the parameters after all but the shadows have learned on."""
    options, (shadows, rest) = work.options, partition(params)
    plan = FitConfig.of(options, steps=options.settle_steps, learning_rate=options.settle_rate)
    trainer = work.trainer(work.folder / "frozen_codes", "end_to_end frozen_codes")

    def batches(step: int, rest: Any) -> dict[str, np.ndarray]:
        return points(options.learning_steps + step, combine(shadows, rest))

    constants = constants | {"shadows": shadows}
    return combine(shadows, fit(trainer, plan, work.mesh, FrozenCodesLoss(loss), rest, batches, constants))


def rollout_starts(options: Options) -> list[int]:
    """The steps of phase `end_to_end`, those with frozen codes counted on, at which the student samples rollouts: none
    where batches have one point."""
    steps = options.learning_steps
    if not options.own_trajectories or options.batch == 1:
        return []
    starts = [steps * (i + 1) // (ROLLOUT_ROUNDS + 1) for i in range(ROLLOUT_ROUNDS)]
    return [*starts, steps] if options.settle_steps else starts


class BatchSampler:
    """Batches of phase `end_to_end`, the steps with frozen codes counted on: the teacher's trajectories, and from the
    first of `starts` on, in equal parts, on-policy rollouts (none in a batch of one point); these are sampled anew by
    the running mean of the student's weights at each of `starts`."""

    def __init__(self, work: RunContext, graph: Any, trajectories: Trajectories, drawn: np.ndarray | None):
        self.work, self.graph, self.trajectories, self.drawn = work, graph, trajectories, drawn
        self.starts = rollout_starts(work.options)
        self.round = 0
        self.rollouts: Trajectories | None = None

    def __call__(self, step: int, mean: Any) -> dict[str, np.ndarray]:
        if (current := bisect.bisect(self.starts, step)) != self.round:
            self.round, self.rollouts = current, self._sample(current, mean)
        size = self.work.options.batch
        ours = self._draw(self.rollouts, 1_000_001, step, size // 2) if self.rollouts else {}
        theirs = self._draw(self.trajectories, 1_000_000, step, size - size // 2 if ours else size)
        return {name: np.concatenate([value, ours[name]]) if ours else value for name, value in theirs.items()}

    def _draw(self, trajectories: Trajectories, phase: int, step: int, size: int) -> dict[str, np.ndarray]:
        return trajectories.points(*trajectories.draw(self.work.options.seed, phase, step, size, self.drawn))

    def _sample(self, current: int, mean: Any) -> Trajectories:
        work, count = self.work, self.work.options.own_trajectories
        first = work.options.trajectories + (current - 1) * count
        student = nnx.merge(self.graph, in_dtype(mean, work.dtype))
        made = load_or_make(work, f"rollouts.{current}", work.training, count, first=first, behaviour=student)
        memmap_store.remove(work.folder / f"rollouts.{current - 1}")
        return made
