"""Random operands, by programs that compile at once: JAX's own generators would take most of a rehearsal's time.

In: a seed, a number or an array of one, and a shape. Out: arrays that depend on these alone, the same on every device:
each element is a hash of its place and the seed. All operations are elementwise: no number lies in memory twice.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BYTES_MEAN, BYTES_DEVIATION = 4 * 127.5, math.sqrt(4 * (256**2 - 1) / 12)  # of the sum of four random bytes


def _hash(x: jax.Array) -> jax.Array:
    """uint32 -> uint32, one to one: lowbias32 of C. Wellons, "Prospecting for Hash Functions" (2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> jnp.uint32(shift)) * jnp.uint32(factor)
    return x ^ x >> jnp.uint32(16)


def bits(seed: Any, shape: tuple[int, ...]) -> jax.Array:
    """uint32, all values alike."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _hash(place ^ _hash(jnp.asarray(seed, jnp.uint32)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(seed: Any, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Mean 0, deviation 1, none beyond 3.5: the sum of four bytes."""
    drawn = bits(seed, shape)
    parts = [(drawn >> jnp.uint32(8 * i) & jnp.uint32(255)).astype(jnp.int32) for i in range(4)]
    return ((sum(parts).astype(jnp.float32) - BYTES_MEAN) / BYTES_DEVIATION).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def uniform(seed: Any, shape: tuple[int, ...], least: float, most: float, dtype: Any = jnp.float32) -> jax.Array:
    """From `least` to `most`."""
    drawn = (bits(seed, shape) >> jnp.uint32(8)).astype(jnp.float32)  # 24 bits, which float32 holds exactly
    return (least + (most - least) / 2**24 * drawn).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def integers(seed: Any, shape: tuple[int, ...], least: int, most: int, dtype: Any = jnp.int8) -> jax.Array:
    """Whole numbers from `least` to `most`, both of them included."""
    drawn = (bits(seed, shape) % jnp.uint32(most - least + 1)).astype(jnp.int32)
    return (drawn + least).astype(dtype)
