"""Seconds that an operation takes on the device, free of what the host does between two launches.

In: an operation (x, weights) -> y, jitted, and several copies of its weights. Out: seconds of one call, sample by
sample. A program runs the operation many times in a loop on the device, over all copies of the weights in turn: their
sum is larger than any cache, so that every call finds its weights in memory, as a layer among many does.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PROGRAM_SECONDS = 0.03  # of one sample: the host's part, about 0.1 ms, is lost in it
CACHE_BYTES = 2**28  # more than any L2 cache; the copies of the weights take at least as much
MOST_COPIES, LEAST_COPIES = 64, 2


def copies(weights: Any, count: int | None = None) -> list[Any]:
    """The weights, and further arrays of the same contents: `count` in all, or as many as flush the cache."""
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    count = count or min(MOST_COPIES, max(LEAST_COPIES, -(-CACHE_BYTES // nbytes)))
    return [weights, *(jax.tree.map(jnp.copy, weights) for _ in range(count - 1))]


def loop(operation: Callable[[Any, Any], jax.Array], rounds: int) -> Any:
    """A jitted program (x, [weights of each copy]) -> last outputs, which runs all copies `rounds` times in turn."""

    @jax.jit
    def program(x: Any, copies: Sequence[Any]) -> list[jax.Array]:
        def body(_, carry):
            x, outputs = carry
            for i, weights in enumerate(copies):
                # The barrier makes a call depend on what came before: nothing can be left out, merged or moved. Vectors
                # stay outside, or XLA would not add a bias within the product.
                leaves, tree = jax.tree.flatten(weights)
                held = [leaf for leaf in leaves if leaf.ndim > 1]
                x, held, outputs = jax.lax.optimization_barrier((x, held, outputs))
                own = [held.pop(0) if leaf.ndim > 1 else leaf for leaf in leaves]
                outputs = [*outputs[:i], operation(x, tree.unflatten(own)), *outputs[i + 1 :]]
            return x, outputs

        shape = jax.eval_shape(operation, x, copies[0])
        outputs = [jnp.zeros(shape.shape, shape.dtype) for _ in copies]
        return jax.lax.fori_loop(0, rounds, body, (x, outputs))[1]

    return program


def rounds_for(seconds: float, copies: int) -> int:
    """How often a loop goes round to last about PROGRAM_SECONDS, if one call takes `seconds`."""
    return max(1, round(PROGRAM_SECONDS / (seconds * copies)))


def samples(compiled: Any, x: Any, copies: Sequence[Any], rounds: int, count: int) -> list[float]:
    """Seconds of one call, `count` times, after one run to warm up."""
    jax.block_until_ready(compiled(x, copies))
    found = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, copies))
        found.append((time.perf_counter() - start) / (rounds * len(copies)))
    return found


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, the half of the samples around it, and all of them (microseconds, in the order measured)."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return {
        "seconds": float(middle),
        "quartiles": [float(low), float(high)],
        "samples_us": [round(s * 1e6, 3) for s in seconds],
    }
