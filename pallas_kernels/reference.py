"""The ternary matrix product in plain XLA: the backend for every device, and what the kernels are tested against.

In: x [m, 4 kp] (int8 with row_scale [m], or floating), packed [n, kp] uint8, scale [n], bias [n]. Out: [m, n].

It unpacks the weights to a scratch matrix and hands both to XLA's own matrix product. With floating activations and
many rows that is also the fast way on a GPU: the product is bound by arithmetic there, cuBLAS does it best, and reading
2 bits instead of 16 saves next to nothing (the scratch holds one layer, 75 MB of bfloat16 for 12288 x 3072).
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Int32, Num, UInt8

from pallas_kernels.packing import unpack_ternary

SMALLEST = 1e-30  # absmax of a row of zeros, or of next to nothing, so that no scale is zero or denormal
EXACT_IN_FLOAT32 = 2**24 // 127  # longest row whose int8 x ternary sums float32 holds exactly


def quantize_rows(
    x: Float[Array, "*rows k"], largest: Float[Array, "*rows"] | None = None
) -> tuple[Int8[Array, "*rows k"], Float32[Array, "*rows"]]:
    """Rows to int8 by their largest magnitude: x ~ q * scale[..., None], scale = max |x| / 127, q in -127..127.

    largest: that magnitude, for an x that holds only some columns of its rows; None: x's own. Rounds half to even. A
    row with NaN or infinity gets a scale that is not finite, so that the result is not, either.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1) if largest is None else largest.astype(jnp.float32)
    largest = jnp.maximum(largest, SMALLEST)
    q = jnp.clip(jnp.round(x * (127 / largest)[..., None]), -127, 127)
    return q.astype(jnp.int8), largest / 127


def integer_sums(q: Int8[Array, "m k"], codes: Int8[Array, "n k"]) -> Int32[Array, "m n"]:
    """q @ codes.T, exact. On a CPU by float32 products, whose sums of integers are exact below 2**24, and faster."""
    if q.shape[-1] > EXACT_IN_FLOAT32:
        return dot(q, codes, jnp.int32)
    return jax.lax.platform_dependent(
        q,
        codes,
        cpu=lambda q, codes: dot(q, codes, jnp.float32, jnp.float32).astype(jnp.int32),
        default=lambda q, codes: dot(q, codes, jnp.int32),
    )


def floating_product(
    x: Float[Array, "m k"],
    codes: Int8[Array, "n k"],
    scale: Float32[Array, " n"],
    bias: Float[Array, " n"],
    *,
    out_dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """x @ codes.T * scale + bias, in float32 until the end: what a CPU does, which rounds between the parts of a sum,
    too, where it is asked for bfloat16."""
    y = dot(x, codes, jnp.float32, x.dtype) * scale[None]
    return (y + bias.astype(jnp.float32)[None]).astype(out_dtype)


def dense_product(
    x: Float[Array, "m k"],
    codes: Int8[Array, "n k"],
    scale: Float32[Array, " n"],
    bias: Float[Array, " n"],
    *,
    out_dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """x @ weight.T + bias, whose weight is codes * scale in x's dtype: a dense layer's product, what a GPU does.

    The bias, and a GELU behind it, are then the epilogue of cuBLAS's product. A scale behind the product would be a
    pass over its output; by the bytes that it moves, a sixth of the product's time where k is 3072.
    """
    # XLA would join the products of one x to a single one, whose epilogue is neither one's bias nor the other's GELU.
    x, scale = jax.lax.optimization_barrier((x, scale))
    weight = (codes.astype(jnp.float32) * scale[:, None]).astype(x.dtype)
    return dot(x, weight, out_dtype) + bias.astype(out_dtype)[None]


def matmul(
    x: Num[Array, "m k"],
    row_scale: Float32[Array, " m"] | None,
    packed: UInt8[Array, "*layers n kp"],
    scale: Float32[Array, "*layers n"],
    bias: Float[Array, "*layers n"] | None,
    *,
    out_dtype: jnp.dtype,
    layer: Int32[Array, ""] | None = None,
    channels: tuple[int, int] | None = None,
) -> Num[Array, "m channels"]:
    """(x @ codes.T) * row_scale[:, None] * scale + bias, with k = 4 kp: x's columns are padded as the weights' are.

    x int8 comes with row_scale, floating x without; then a GPU rounds scale to x's dtype, and bias to out_dtype. layer
    picks one of the stacked packed, scale and bias; channels are those to compute, from the first up to the second
    (default: all).
    """
    if layer is not None:
        packed, scale = packed[layer], scale[layer]
        bias = None if bias is None else bias[layer]
    if channels is not None:
        packed, scale = packed[slice(*channels)], scale[slice(*channels)]
        bias = None if bias is None else bias[slice(*channels)]
    codes = jnp.asarray(unpack_ternary(packed, x.shape[-1]))
    bias = jnp.zeros_like(scale) if bias is None else bias
    if row_scale is None:
        return jax.lax.platform_dependent(
            *(x, codes, scale, bias),
            cpu=functools.partial(floating_product, out_dtype=out_dtype),
            default=functools.partial(dense_product, out_dtype=out_dtype),
        )
    y = integer_sums(x, codes).astype(jnp.float32) * row_scale[:, None] * scale[None]
    return (y + bias.astype(jnp.float32)[None]).astype(out_dtype)


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """What every product is given whose operands are of that dtype: float32 means float32.

    Without it a GPU rounds their operands to 10 bits (TF32), in XLA and in Triton: an error of 3e-4 to 1e-3.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def dot(
    x: Num[Array, "*m k"], y: Num[Array, "n k"], result: DTypeLike, operands: DTypeLike | None = None
) -> Num[Array, "*m n"]:
    """x @ y.T with sums, and a result, of that dtype; operands: a dtype to give both before."""
    x, y = (x, y) if operands is None else (x.astype(operands), y.astype(operands))
    contracted = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, y, contracted, precision=precision(x.dtype), preferred_element_type=result)
