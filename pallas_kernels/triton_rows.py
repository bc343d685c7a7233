"""Rows of tokens rounded to int8 as Pallas Triton kernels: each row is read once, by a program of its own.

In: tokens, and what changes them first: a norm and its modulation, or others to be joined with them. Out: int8 rows and
the scale of each [m] float32, as `pallas_kernels.reference.quantize_rows` gives them.

A row stays in registers, in pieces of a power of two of channels. What all threads must know of it, a sum or a largest
value, takes barriers: so pieces of one size are folded into one before, which for FLUX's widths are all of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int8

from pallas_kernels import epilogues, reference
from pallas_kernels.triton import launch, to_int8

PIECE = 1024  # channels, at most
NARROW = 4096  # channels that four warps hold; eight hold FLUX's widest row, of 15360


def _pieces(width: int) -> list[Any]:
    """The slices of a row that a program takes one by one."""
    found, start = [], 0
    while start < width:
        found.append(pl.ds(start, min(PIECE, 1 << (width - start).bit_length() - 1)))
        start += found[-1].size
    return found


def _over_row(fold: Callable, reduce: Callable, parts: Sequence[Array]) -> Array:
    """One number of a row from its pieces: those of a size are folded element by element, then each is reduced."""
    sizes: dict[int, Array] = {}
    for part in parts:
        sizes[part.size] = fold(sizes[part.size], part) if part.size in sizes else part
    return functools.reduce(fold, map(reduce, sizes.values()))


def _store_rounded(parts: Sequence[Array], pieces: Sequence[Any], q: Any, row_scale: Any, interpret: bool) -> None:
    """A whole row and its scale. Magnitudes are compared by their bits, in whose order NaN stands above infinity: a
    GPU's maximum of floats passes over NaN, which must reach the scale."""
    row = pl.program_id(0)
    bits = [lax.bitcast_convert_type(part, jnp.int32) & 0x7FFFFFFF for part in parts]
    largest = lax.bitcast_convert_type(_over_row(jnp.maximum, jnp.max, bits), jnp.float32)
    largest = jnp.where(largest < reference.SMALLEST, reference.SMALLEST, largest)
    plt.store(row_scale.at[row], largest / 127)
    for part, piece in zip(parts, pieces, strict=True):
        plt.store(q.at[row, piece], to_int8(part * (127 / largest), interpret=interpret))


def _norm_modulate_quantize_kernel(x, shift, scale, q, row_scale, *, interpret: bool):
    d, row, total = x.shape[1], pl.program_id(0), functools.partial(_over_row, jnp.add, jnp.sum)
    pieces = _pieces(d)
    parts = [plt.load(x.at[row, piece]).astype(jnp.float32) for piece in pieces]
    mean = total(parts) / d
    parts = [part - mean for part in parts]
    norm = lax.rsqrt(total([part * part for part in parts]) / d + epilogues.EPS)

    def modulated(part, piece):
        shift_, scale_ = (plt.load(vector.at[piece]).astype(jnp.float32) for vector in (shift, scale))
        return part * norm * (1 + scale_) + shift_

    _store_rounded(list(map(modulated, parts, pieces)), pieces, q, row_scale, interpret)


def _concatenate_quantize_kernel(*refs, interpret: bool):
    *parts, q, row_scale = refs
    found, places, first = [], [], 0
    for part in parts:
        for piece in _pieces(part.shape[1]):
            found.append(plt.load(part.at[pl.program_id(0), piece]).astype(jnp.float32))
            places.append(pl.ds(first + piece.start, piece.size))
        first += part.shape[1]
    _store_rounded(found, places, q, row_scale, interpret)


def _by_rows(
    kernel: Callable, operands: Sequence[Array], m: int, width: int, interpret: bool
) -> tuple[Int8[Array, "m width"], Float[Array, " m"]]:
    axes = jax.typeof(operands[0]).manual_axis_type
    out = [jax.ShapeDtypeStruct(s, d, manual_axis_type=axes) for s, d in (((m, width), jnp.int8), ((m,), jnp.float32))]
    warps = 4 if width <= NARROW else 8
    kernel = functools.partial(kernel, interpret=interpret)
    q, row_scale = launch(kernel, list(operands), out, m, interpret, num_warps=warps, num_stages=1)
    return q, row_scale


def norm_modulate_quantize(
    x: Float[Array, "m d"], shift: Float[Array, " d"], scale: Float[Array, " d"], *, interpret: bool = False
) -> tuple[Int8[Array, "m d"], Float[Array, " m"]]:
    """quantize_rows(layer_norm(x) * (1 + scale) + shift) -> int8 [m, d] and float32 [m]."""
    m, d = x.shape
    return _by_rows(_norm_modulate_quantize_kernel, (x, shift, scale), m, d, interpret)


def concatenate_quantize(
    *parts: Float[Array, "m _"], interpret: bool = False
) -> tuple[Int8[Array, "m k"], Float[Array, " m"]]:
    """quantize_rows(concatenate(parts, axis=-1)) -> int8 [m, k] and float32 [m]; no joined row is in memory."""
    return _by_rows(_concatenate_quantize_kernel, parts, len(parts[0]), sum(x.shape[1] for x in parts), interpret)
