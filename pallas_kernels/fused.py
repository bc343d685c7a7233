"""What stands before and behind FLUX's ternary products, in one kernel with them, for inference: no gradients.

In: tokens [m, d] and their modulation, or activations that are quantized already, with packed weights. Out: int8
activations with a scale per row; or the product after its epilogue, [m, n]. Each intermediate that is not written to
memory saves a pass over some 28 to 113 MB per layer of a 1024 x 1024 picture (4608 tokens). Every function has an XLA
twin here, which runs on any device; `pallas_kernels.triton` holds the kernels.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8, Num, UInt8

from pallas_kernels import reference
from pallas_kernels.dispatch import Target, choose_implementation, current_target
from pallas_kernels.epilogues import EPS, Epilogue, GeluQuantize, NormRope, epilogue_name, finish
from pallas_kernels.packing import check_packed
from pallas_kernels.tiling import TileConfig, choose_tiles


def epilogue_tiles(target: Target, m: int, n: int, k: int, operand: str, epilogue: Epilogue | None) -> TileConfig:
    """The tile that a product gets with an epilogue: as chosen for it, and one head wide for NormRope."""
    settings = choose_tiles(target, m, n, k, operand, epilogue_name(epilogue))
    if isinstance(epilogue, NormRope):
        return dataclasses.replace(settings, block_n=len(epilogue.weight))
    return settings


def norm_modulate_quantize(
    x: Float[Array, "m d"], shift: Float[Array, " d"], scale: Float[Array, " d"], *, implementation: str | None = None
) -> tuple[Int8[Array, "m d"], Float32[Array, " m"]]:
    """quantize_rows(layer_norm(x) * (1 + scale) + shift), in float32: adaptive layer norm in front of a product.

    One kernel reads x once; XLA goes over it once for the norm, once for the largest value and once to round.
    ValueError for an unsupported implementation.
    """
    target = current_target()
    if choose_implementation(implementation, target, len(x), "int8") == "triton":
        from pallas_kernels import triton_rows

        return triton_rows.norm_modulate_quantize(x, shift, scale, interpret=target.platform == "interpret")
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPS)
    y = y * (1 + scale.astype(jnp.float32)[None]) + shift.astype(jnp.float32)[None]
    return reference.quantize_rows(y)


def concatenate_quantize(
    *parts: Float[Array, "m _"], implementation: str | None = None
) -> tuple[Int8[Array, "m k"], Float32[Array, " m"]]:
    """quantize_rows(concatenate(parts, axis=-1)): int8 [m, k] and float32 [m], where k is the sum of the parts' widths.

    One kernel reads each part once; XLA joins them, goes over the rows for their largest values, and again to round.
    ValueError for an unsupported implementation.
    """
    target = current_target()
    if choose_implementation(implementation, target, len(parts[0]), "int8") == "triton":
        from pallas_kernels import triton_rows

        return triton_rows.concatenate_quantize(*parts, interpret=target.platform == "interpret")
    return reference.quantize_rows(jnp.concatenate(parts, axis=-1))


def fused_matmul(
    x: Num[Array, "m k"],
    row_scale: Float32[Array, " m"] | None,
    packed: UInt8[Array, "*layers n kp"],
    scale: Float32[Array, "*layers n"],
    bias: Float[Array, "*layers n"] | None,
    epilogue: Epilogue | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    layer: Int[Array, ""] | None = None,
    channels: tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Num[Array, "m channels"]:
    """(x @ codes.T) * row_scale[:, None] * scale + bias, then the epilogue -> [m, n]; int8 from GeluQuantize.

    x is int8 with `row_scale` or floating without; its k codes a row take kp bytes. `layer` picks one of the stacked
    weights, `channels` those of the output to compute, from the first up to the second. ValueError for packed rows of
    another width, and for an unsupported implementation.
    """
    check_packed(packed, x.shape[1])
    target, k = current_target(), 4 * packed.shape[-1]
    first, last = channels or (0, packed.shape[-2])
    out_dtype = jnp.int8 if isinstance(epilogue, GeluQuantize) else out_dtype
    if x.shape[1] != k:
        x = jnp.pad(x, ((0, 0), (0, k - x.shape[1])))
    if choose_implementation(implementation, target, len(x), x.dtype.name) == "triton":
        from pallas_kernels import triton

        head = len(epilogue.weight) if isinstance(epilogue, NormRope) else 16
        inside = epilogue if head >= 16 and head & (head - 1) == 0 else None  # no tile has another head's width
        settings = epilogue_tiles(target, len(x), last - first, k, x.dtype.name, inside)
        y = triton.matmul(
            x,
            row_scale,
            packed,
            scale,
            bias,
            settings=settings,
            out_dtype=out_dtype if inside is epilogue else jnp.float32,
            layer=layer,
            channels=channels,
            epilogue=inside,
            interpret=target.platform == "interpret",
        )
        return y if inside is epilogue else finish(y, epilogue).astype(out_dtype)
    index, wide = None if layer is None else layer.astype(jnp.int32), jnp.dtype(jnp.float32)
    y = reference.matmul(x, row_scale, packed, scale, bias, out_dtype=wide, layer=index, channels=channels)
    return finish(y, epilogue).astype(out_dtype)
