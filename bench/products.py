"""The matrix products of FLUX's blocks as things to measure: shapes, random operands, implementations, what is right.

In: a `FluxConfig`. Out: `shapes`, every (n, k) of a ternary layer with the names of its layers; `operands`, random
activations and weights of one of them; `IMPLEMENTATIONS`, functions (x, weights) -> y that compute the product in
different ways; `error`, how far a result is from float64 (`expected`).
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flux_jax.config import FluxConfig
from flux_jax.quantize import ternary_paths
from pallas_kernels import pack_ternary, quantize_rows, ternary_matmul, unpack_ternary
from pallas_kernels.settings import Settings, choose_settings, current_target

CHECKED_ROWS = 32  # of a result, compared with float64
# Largest error over the largest value. bfloat16 rounds a result by up to 2**-9 of itself; the sums of bf16 products are
# float32, whose rounding is below that; the integer sums are exact, and their error is that of the output alone.
LIMITS = {"bf16": 1e-2, "int8": 2**-8}


class Implementation(NamedTuple):
    """One way to compute the product. weights: "dense" (bf16 [n, k]) or "packed"; activations: "bf16" or "int8"."""

    weights: str
    activations: str
    function: Callable[[Any, dict[str, jax.Array]], jax.Array]


def shapes(config: FluxConfig) -> dict[tuple[int, int], list[str]]:
    """(n, k) of every ternary layer -> the layers that have it, "double_blocks.img.qkv"."""
    found: dict[tuple[int, int], list[str]] = {}
    for path, shape in ternary_paths(config).items():
        name = re.sub(r"\.\d+\.", ".", path)
        if name not in found.setdefault(shape, []):
            found[shape].append(name)
    return dict(sorted(found.items()))


def dense(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    """As `flux_jax.models.linear.Linear` computes it: XLA takes cuBLAS, or its own kernel if that is faster."""
    y = jax.lax.dot_general(x, weights["weight"], (((1,), (1,)), ((), ())))
    return y + weights["bias"][None]


def ternary(activations: str, implementation: str) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
    def product(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        return ternary_matmul(x, **weights, activations=activations, implementation=implementation)

    return product


def kernel(x: Any, weights: dict[str, jax.Array], settings: Settings | None = None) -> jax.Array:
    """The Triton kernel by itself. x: bf16 [m, k], or (int8 [m, k], float32 [m]) as another kernel has quantized it.

    settings: those to try; None takes what the product would take.
    """
    from pallas_kernels import triton  # deprecated in JAX: a machine without it measures the rest

    rows, row_scale = x if isinstance(x, tuple) else (x, None)
    target, n = current_target(), weights["packed"].shape[0]
    settings = settings or choose_settings(target, *rows.shape[:1], n, rows.shape[1], str(rows.dtype))
    interpret = target.platform == "interpret"
    return triton.matmul(
        rows, row_scale, **weights, settings=settings, out_dtype=jnp.dtype(jnp.bfloat16), interpret=interpret
    )


IMPLEMENTATIONS = {
    "bf16": Implementation("dense", "bf16", dense),
    "A16 kernel": Implementation("packed", "bf16", ternary("bf16", "triton")),
    "A16 scratch": Implementation("packed", "bf16", ternary("bf16", "xla")),
    "A8 kernel": Implementation("packed", "int8", ternary("int8", "triton")),
    "A8 scratch": Implementation("packed", "int8", ternary("int8", "xla")),
    "A8 kernel, int8 given": Implementation("packed", "int8", kernel),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def operands(m: int, n: int, k: int) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """x bf16 [m, k] and two sets of weights, made on the device: "dense" and "packed". Nothing in them is zero."""
    draw = [jax.random.key(i) for i in range(5)]
    x = jax.random.normal(draw[0], (m, k), jnp.bfloat16)
    bias = jax.random.normal(draw[1], (n,), jnp.bfloat16)
    weight = jax.random.normal(draw[2], (n, k), jnp.bfloat16)
    codes = jax.random.randint(draw[3], (n, k), -1, 2, jnp.int8)
    scale = jax.random.uniform(draw[4], (n,), jnp.float32, 0.5, 1.5)
    return x, {"weight": weight, "bias": bias}, {"packed": pack_ternary(codes), "scale": scale, "bias": bias}


@jax.jit
def quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x as another kernel leaves it: int8 [m, k] and the scale of each row."""
    return quantize_rows(x)


def expected(activations: str, x: jax.Array, weights: dict[str, jax.Array]) -> np.ndarray:
    """`CHECKED_ROWS` rows of the product, spread over all, float64 on the host.

    With int8 activations the product of the integers themselves: what rounding x costs is no error of a kernel.
    """
    kept = checked_rows(x.shape[0])
    if activations == "int8":
        q, row_scale = (np.asarray(part[kept], np.float64) for part in quantized(x))
        rows = q * row_scale[:, None]
    else:
        rows = np.asarray(x[kept], np.float64)
    bias = np.asarray(weights["bias"], np.float64)
    if "weight" in weights:
        return rows @ np.asarray(weights["weight"], np.float64).T + bias
    codes = unpack_ternary(np.asarray(weights["packed"]), x.shape[-1]).astype(np.float64)
    return rows @ codes.T * np.asarray(weights["scale"], np.float64) + bias


def error(y: jax.Array, right: np.ndarray) -> float:
    """Largest error of y [m, n] over the largest value, on the rows of `expected`; infinite where y is not finite."""
    found = np.asarray(y[checked_rows(y.shape[0])], np.float64)
    return float(np.abs(found - right).max() / np.abs(right).max()) if np.isfinite(found).all() else float("inf")


def checked_rows(m: int) -> np.ndarray:
    return np.unique(np.linspace(0, m - 1, CHECKED_ROWS).astype(int))
