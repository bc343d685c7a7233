"""A transformer of random weights and the inputs of one picture, made where they are needed: on the device.

In: an abstract transformer, and a `FluxConfig`. Out: the same module with arrays of the right kind: normal weights that
keep activations near one, packed bytes of valid codes, norms of one. No weight crosses from the host, and no more than
one layer is held twice, so that the device's peak stays that of the denoising.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import draw
from flux_jax.config import FluxConfig
from flux_jax.models.params import STACKED
from flux_jax.sampling.programs import Conditions
from flux_jax.sampling.schedule import rope_table, sigmas

DIGITS = (0b00, 0b01, 0b11)  # the bits of the codes 0, 1 and -1
STRIDE = 1000  # between the seeds of two stacks: more than their layers
BYTES = np.array([a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product(DIGITS, repeat=4)], np.uint8)


def weights(transformer: nnx.Module, seed: int = 0) -> nnx.Module:
    """The abstract module with random weights on JAX's default device; packed rows must be whole tiles."""
    definition, state = nnx.split(transformer)
    inputs = {path[:-1]: 4 * v.shape[-1] for path, v in nnx.to_flat_state(state) if path[-1] == "packed"}
    filled = []
    for i, (path, variable) in enumerate(nnx.to_flat_state(state)):
        shape, dtype = variable.shape, jnp.dtype(variable.dtype)
        layers = shape[0] if path[0] in STACKED else 1
        one = shape[1:] if path[0] in STACKED else shape
        spread = (1.5 / inputs.get(path[:-1], one[-1])) ** 0.5  # two codes of three are not zero
        kind = "norm" if "norm" in path[-2] else path[-1]
        first = seed + i * STRIDE
        filled.append((path, variable.replace(_stack(kind, layers, one, dtype, spread, first).reshape(shape))))
    return nnx.merge(definition, nnx.from_flat_state(filled))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _stack(kind: str, layers: int, shape: tuple[int, ...], dtype: Any, spread: Any, seed: Any) -> jax.Array:
    """[layers, *shape], made one layer after the other."""

    def layer(seed: jax.Array) -> jax.Array:
        if kind == "packed":
            return jnp.asarray(BYTES)[draw.integers(seed, shape, 0, len(BYTES) - 1, jnp.int32)]
        if kind in ("norm", "scale"):
            return jnp.full(shape, 1.0 if kind == "norm" else spread, dtype)
        return draw.normal(seed, shape, dtype) * jnp.asarray(spread if kind == "weight" else 0.02, dtype)

    return jax.lax.map(layer, jnp.asarray(seed, jnp.uint32) + jnp.arange(layers, dtype=jnp.uint32))


def inputs(config: FluxConfig, steps: int, rows: int, columns: int, dtype: Any) -> tuple[Any, Any, Conditions]:
    """Noise [i, c], sigmas [steps + 1] and random conditions of one picture of rows x columns tokens."""
    transformer, text = config.transformer, config.sampling.max_sequence_length
    conditions = Conditions(
        text=draw.normal(0, (1, text, transformer.text_dim), dtype),
        pooled=draw.normal(1, (1, transformer.pooled_dim), dtype),
        guidance=jnp.float32(3.5),
        true_cfg=jnp.float32(1.0),
        rope=jnp.asarray(rope_table(transformer, rows, columns, text)),
    )
    noise = draw.normal(2, (rows * columns, transformer.in_channels), jnp.float32)
    return noise, jnp.asarray(sigmas(config.sampling, steps, rows * columns)), conditions
