"""Ways to compute a ternary product of FLUX, and the same as cases for `bench.timing`.

In: the shape of a product. Out: `IMPLEMENTATIONS`, functions (x, weights) -> y by name; `plain_case`, one of them;
`fused_case`, a product with what it ends with, as the model runs it, by any function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench.products import LIMITS, Product, epilogue_operands, expected, judged, rounded, tokens, weights
from bench.timing import Case, Ran, copies_for
from flux_jax.models import layers
from pallas_kernels import epilogues, fused, ternary_matmul
from pallas_kernels.dispatch import current_target
from pallas_kernels.packing import PLANE, TILE
from pallas_kernels.tiling import TileConfig


class Implementation(NamedTuple):
    """One way to compute the product. weights: "dense" (bf16 [n, k]) or "packed"; activations: as in `LIMITS`."""

    weights: str
    activations: str
    function: Callable[[Any, dict[str, jax.Array]], jax.Array]


def dense(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    """As `flux_jax.models.layers.Linear` computes it: XLA takes cuBLAS, or its own kernel if that is faster."""
    return layers.product(x, weights["weight"]) + weights["bias"][None]


def ternary(activations: str, implementation: str) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
    def product(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        return ternary_matmul(x, **weights, activations=activations, implementation=implementation)

    return product


def kernel(
    x: Any, weights: dict[str, jax.Array], epilogue: Any = None, settings: TileConfig | None = None
) -> jax.Array:
    """The Triton kernel by itself. x: bf16 [m, k], or (int8 [m, k], float32 [m]) as another kernel has quantized it.

    settings: those to try; None takes what the product would take.
    """
    from pallas_kernels import triton  # deprecated in JAX: a machine without it measures the rest

    rows, row_scale = x if isinstance(x, tuple) else (x, None)
    target, n = current_target(), weights["packed"].shape[0]
    settings = settings or fused.epilogue_tiles(target, *rows.shape[:1], n, rows.shape[1], str(rows.dtype), epilogue)
    how = {"settings": settings, "epilogue": epilogue, "interpret": target.platform == "interpret"}
    return triton.matmul(rows, row_scale, **weights, out_dtype=jnp.dtype(jnp.bfloat16), **how)


def fp8_scratch(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    """A product without a kernel of ours: two bits on top of a byte ARE the e4m3 number 2 t, so that one pass unpacks
    the weights for cuBLAS's product of fp8, and one rounds x by rows. ValueError where the GPU has no fp8."""
    target, packed = current_target(), weights["packed"]
    if target.platform == "gpu" and tuple(map(int, target.compute_capability.split("."))) < (8, 9):
        raise ValueError(f"{target.name} has no fp8")
    tiles = packed.reshape(len(packed), -1, 1, PLANE)
    shifts = jnp.arange(6, -1, -2, dtype=jnp.uint8).reshape(1, 1, TILE // PLANE, 1)
    bits = jnp.left_shift(*jnp.broadcast_arrays(tiles, shifts)) & jnp.uint8(0xC0)
    codes = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).reshape(len(packed), -1)
    rows, row_scale = rounded("fp8", jnp.pad(x, ((0, 0), (0, codes.shape[1] - x.shape[1]))))
    y = jax.lax.dot_general(rows, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)
    y = y.astype(jnp.float32) * row_scale[:, None] * (weights["scale"] / 2)[None]
    return (y + weights["bias"].astype(jnp.float32)[None]).astype(jnp.bfloat16)


IMPLEMENTATIONS = {
    "bf16": Implementation("dense", "bf16", dense),
    "A16 kernel": Implementation("packed", "bf16", ternary("bf16", "triton")),
    "A16 scratch": Implementation("packed", "bf16", ternary("bf16", "xla")),
    "A8 kernel": Implementation("packed", "int8", ternary("int8", "triton")),
    "A8 scratch": Implementation("packed", "int8", ternary("int8", "xla")),
    "A8 kernel, int8 given": Implementation("packed", "int8", kernel),
    "fp8 scratch": Implementation("packed", "fp8", fp8_scratch),
}


def rate(m: int, n: int, k: int, seconds: float) -> dict[str, float]:
    """Of a product that takes so long."""
    return {"tflops": 2e-12 * m * n * k / seconds}


def plain_case(m: int, n: int, k: int, name: str) -> Case:
    """The product by one of `IMPLEMENTATIONS`."""
    kind, activations, function = IMPLEMENTATIONS[name]

    def operands() -> tuple[Any, Any, None]:
        x = tokens(m, k)
        return rounded(activations, x) if function is kernel else x, weights(kind, n, k), None

    def figures(ran: Ran) -> dict[str, Any]:
        right = expected(activations, *ran.operands[:2])
        return rate(m, n, k, ran.seconds) | judged(ran.out, right, LIMITS[activations])

    labels = {"m": m, "n": n, "k": k, "implementation": name}
    return Case(labels, lambda x, own, _: function(x, own), operands, figures, copies_for(m))


def fused_case(
    product: Product,
    head: int,
    labels: dict[str, Any],
    multiply: Callable[[Any, dict[str, jax.Array], epilogues.Epilogue | None], jax.Array],
    activations: str = "int8",
) -> Case:
    """A product with its epilogue by `multiply` (x, weights, epilogue) -> y, where x is (int8 [m, k], float32 [m]), or
    bf16 [m, k]. A residual is what the last call left: the output is written in its place. head: channels of a head."""
    m, n, k = product[:3]

    def operands() -> tuple[Any, Any, Any]:
        x, epilogue, out = tokens(m, k), epilogue_operands(product.epilogue, m, n, head), None
        if isinstance(epilogue, epilogues.GatedResidual):
            epilogue, out = epilogue._replace(residual=None), epilogue.residual
        return (rounded("int8", x) if activations == "int8" else x, epilogue), weights("packed", n, k), out

    def whole(epilogue: epilogues.Epilogue | None, out: jax.Array) -> epilogues.Epilogue | None:
        return epilogue._replace(residual=out) if isinstance(epilogue, epilogues.GatedResidual) else epilogue

    def operation(x: Any, own: dict[str, jax.Array], out: jax.Array) -> jax.Array:
        return multiply(x[0], own, whole(x[1], out))

    def figures(ran: Ran) -> dict[str, Any]:
        (x, epilogue), own, out = ran.operands
        right = expected(activations, x, own, whole(epilogue, out), ran.calls)
        # An epilogue rounds to bf16 more than once.
        return rate(m, n, k, ran.seconds) | judged(ran.out, right, LIMITS[activations if epilogue is None else "bf16"])

    labels = {"m": m, "n": n, "k": k, "epilogue": product.epilogue, **labels}
    return Case(labels, operation, operands, figures, copies_for(m))
