"""Denoising: noise becomes latents, in one program for all steps, or step by step for whoever wants to see them.

In: the transformer, noise levels [n + 1], noise [i, c] and conditions of each picture. Out: latents [i, c], or a `Step`
after the other; the same bits either way. UserError where latents stop being finite.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from flux_jax.errors import UserError
from flux_jax.sampling import programs
from flux_jax.sampling.executor import StageExecutor
from flux_jax.sampling.tensor_parallel import ShardedSampler


@dataclasses.dataclass(frozen=True)
class Step:
    """One denoising step of one image: number `index` of `count`, of the image number `image` of the call.

    It led from noise level `sigma_before` to `sigma` (1 is noise, 0 the end). latents: float32 [1, i, c] at `sigma`;
    denoised: the clean latents as estimated before the step, x - sigma_before * velocity, of the same shape.
    """

    index: int
    count: int
    sigma_before: float
    sigma: float
    latents: np.ndarray
    denoised: np.ndarray
    image: int = 0


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The denoising of one call's pictures. sharded: the transformer on a mesh, or None; sigmas: noise levels float32
    [n + 1]; dtype: of the weights, for the hint where they are at fault."""

    executor: StageExecutor
    transformer: nnx.Module
    sharded: ShardedSampler | None
    sigmas: np.ndarray
    noise: Sequence[Any]
    conditions: Sequence[programs.Conditions]
    seeds: Sequence[int]
    dtype: Any

    @property
    def count(self) -> int:
        return len(self.sigmas) - 1

    def latents(self) -> list[Any]:
        """Of each picture, [i, c]: by one program each, or by one for as many as the mesh takes."""
        if self.sharded is not None:
            return self._on_mesh(self.sharded)
        drawn, transformer = [], self.executor.on_device(self.transformer)
        for x, conditions, seed in zip(self.noise, self.conditions, self.seeds, strict=True):
            x, finite = self.executor.run("denoise", programs.denoise, transformer, x, self.sigmas, conditions)
            self.executor.steps += self.count
            self._check(finite, seed)
            drawn.append(x)
        return drawn

    def _on_mesh(self, sharded: ShardedSampler) -> list[Any]:
        drawn: list[Any] = []
        for i in range(0, len(self.seeds), sharded.width):
            group = slice(i, i + sharded.width)
            arguments = sharded.arguments(self.noise[group], self.sigmas, self.conditions[group])
            latents, finite = map(np.asarray, self.executor.run("denoise", sharded.program, *arguments))
            self.executor.steps += self.count
            seeds = self.seeds[group]  # there may be fewer than the mesh has places
            for x, each, seed in zip(latents[: len(seeds)], finite[: len(seeds)], seeds, strict=True):
                self._check(each, seed)
                drawn.append(x)
        return drawn

    def steps(self) -> Generator[Step, Any, None]:
        """Every step of every picture; latents that are sent are what the next step of that picture starts from."""
        if self.sharded is not None:
            raise UserError("Steps one by one (callback_on_step_end, stream) need one device; leave out the mesh.")
        executor, sigmas, transformer = self.executor, self.sigmas, self.executor.on_device(self.transformer)
        # Where the step's result will lie: arrays that are placed otherwise would compile the step a second time.
        place = replicated(transformer)
        for image, (x, conditions, seed) in enumerate(zip(self.noise, self.conditions, self.seeds, strict=True)):
            modulation = executor.run("denoise", programs.modulations, transformer, sigmas, conditions)
            rest, x = (sigmas, conditions, modulation), jax.device_put(x, place)
            step = executor.prepare("denoise", programs.step, transformer, x, *rest, np.int32(0))
            for i in range(self.count):
                x, denoised, finite = step(transformer, x, *rest, np.int32(i))
                executor.steps += 1
                self._check(np.asarray([finite]), seed, first=i)
                # A copy of x: the next step takes over its memory, and whoever gets it may keep it.
                latents, estimate = np.array(x)[None], np.asarray(denoised)[None]
                levels = float(sigmas[i]), float(sigmas[i + 1])
                changed = yield Step(i, self.count, *levels, latents, estimate, image)
                if changed is not None:
                    x = jax.device_put(np.array(changed, np.float32).reshape(x.shape), place)

    def _check(self, finite: Any, seed: int, first: int = 0) -> None:
        """UserError that names the step, unless all of `finite`, of the steps from number `first` on, are true."""
        if (finite := np.asarray(finite)).all():
            return
        damaged = "the checkpoint's weights may be damaged"
        hint = damaged if self.dtype == jnp.float32 else "try dtype float32, or another seed"
        where = f"Step {first + int(finite.argmin()) + 1} of {self.count}"
        raise UserError(f"{where} gave latents that are not finite (seed {seed}, {self.dtype}); {hint}.")


def replicated(module: nnx.Module) -> Sharding:
    """The sharding of an array that lies whole on every device that the module's weights lie on."""
    sharding = jax.tree.leaves(module)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
