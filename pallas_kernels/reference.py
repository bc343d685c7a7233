"""The ternary matrix product in plain XLA: the backend for every device, and what the kernels are tested against.

In: x [m, 4 kp] (int8 with row_scale [m], or floating), packed [n, kp] uint8, scale [n], bias [n]. Out: [m, n].

It unpacks the weights to a scratch matrix and hands both to XLA's own matrix product. With floating activations and
many rows that is also the fast way on a GPU: the product is bound by arithmetic there, cuBLAS does it best, and reading
2 bits instead of 16 saves next to nothing (the scratch holds one layer, 75 MB of bfloat16 for 12288 x 3072).
"""

import jax
import jax.numpy as jnp
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
        return _dot(q, codes, jnp.int8, jnp.int32)
    return jax.lax.platform_dependent(
        q,
        codes,
        cpu=lambda q, codes: _dot(q, codes, jnp.float32, jnp.float32).astype(jnp.int32),
        default=lambda q, codes: _dot(q, codes, jnp.int8, jnp.int32),
    )


def floating_sums(x: Float[Array, "m k"], codes: Int8[Array, "n k"]) -> Float32[Array, "m n"]:
    """x @ codes.T in x's dtype, accumulated in float32.

    A GPU returns x's dtype, to write no float32 matrix: it would cost a third of the time of the product itself. A CPU
    that is asked for bfloat16 rounds between parts of the sum, too, so there it is float32.
    """
    return jax.lax.platform_dependent(
        x,
        codes,
        cpu=lambda x, codes: _dot(x, codes, x.dtype, jnp.float32),
        default=lambda x, codes: _dot(x, codes, x.dtype, x.dtype).astype(jnp.float32),
    )


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

    x int8 comes with row_scale, floating x without. layer picks one of the stacked packed, scale and bias;
    channels are those to compute, from the first up to the second (default: all).
    """
    if layer is not None:
        packed, scale = packed[layer], scale[layer]
        bias = None if bias is None else bias[layer]
    if channels is not None:
        packed, scale = packed[slice(*channels)], scale[slice(*channels)]
        bias = None if bias is None else bias[slice(*channels)]
    codes = jnp.asarray(unpack_ternary(packed, x.shape[-1]))
    if row_scale is None:
        y = floating_sums(x, codes)
    else:
        y = integer_sums(x, codes).astype(jnp.float32) * row_scale[:, None]
    y = y * scale[None]
    return (y if bias is None else y + bias.astype(jnp.float32)[None]).astype(out_dtype)


def _dot(x, codes, operands, result):
    """x @ codes.T with operands of one dtype and sums of another."""
    x, codes = x.astype(operands), codes.astype(operands)
    return jax.lax.dot_general(x, codes, (((1,), (1,)), ((), ())), preferred_element_type=result)
