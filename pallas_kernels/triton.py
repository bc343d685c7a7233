"""Ternary matrix products as Pallas Triton kernels, for NVIDIA GPUs of compute capability 8.0 and up.

In: activations x [m, k] (int8 with a scale per row, or floating), weights packed to 2 bits [n, kp] uint8 as
`pallas_kernels.packing` lays them out, a scale and a bias per channel [n]. Out: [m, n]. The unpacked weights exist in
registers alone.

A packed byte holds four codes, one of each PLANE of its K tile, as 2-bit two's complement. `(byte << (6 - 2 p)) & 0xC0`
therefore IS the int8 number 64 t of plane p, and the factor 64 goes into the channel's scale: no table, no subtraction,
no conversion. The weights are the left operand of the product, W x^T, because only that operand of a tensor-core
instruction may come from registers; the tile is turned round once, when it is stored.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num, UInt8

from pallas_kernels.packing import PLANE, TILE
from pallas_kernels.settings import Settings

_GROUP = 8  # token tiles whose programs run side by side, so that they find each other's weights in the L2 cache
PLANES = TILE // PLANE


def unit(dtype: DTypeLike) -> int:
    """The number that an unpacked code of 1 stands for: the same two bits on top of an int8, or of a 16-bit float."""
    return 64 if jnp.dtype(dtype).itemsize != 2 else 2


def assembly(plane: int, dtype: DTypeLike) -> str:
    """PTX that unpacks one plane of the four bytes in the last operand, into one register of int8 or two of 16 bits.

    The bits that the shift moves into a neighbouring byte are those that the mask takes out. For a 16-bit float each
    byte then becomes the upper half of a number, over a lower half of zeros.
    """
    source = 1 if jnp.dtype(dtype).itemsize == 1 else 2
    unpack = f"shl.b32 t, ${source}, {6 - 2 * plane}; and.b32 t, t, 0xC0C0C0C0;"
    spread = "mov.b32 $0, t;" if source == 1 else "prmt.b32 $0, t, 0, 0x1404; prmt.b32 $1, t, 0, 0x3424;"
    return f"{{ .reg .b32 t; {unpack} {spread} }}"


def unpack_plane(packed: UInt8[Array, "n b"], plane: int, dtype: DTypeLike, *, interpret: bool) -> Num[Array, "n b"]:
    """The codes of one plane of packed bytes as int8, bfloat16, float16 or float32, times `unit(dtype)`.

    The assembly handles the four bytes of a register at once, which Triton does not do by itself: 2 instructions, not
    about 10. It has no rule for the CPU; `interpret` takes the same bits by operations of JAX.
    """
    dtype = jnp.dtype(dtype)
    if dtype.itemsize == 4:
        return unpack_plane(packed, plane, jnp.int8, interpret=interpret).astype(dtype)
    if interpret:
        byte = (packed << jnp.uint8(6 - 2 * plane)) & jnp.uint8(0xC0)
        bits = byte if dtype.itemsize == 1 else byte.astype(jnp.uint16) << jnp.uint16(8)
        return lax.bitcast_convert_type(bits, dtype)
    (codes,) = plt.elementwise_inline_asm(
        assembly(plane, dtype),
        args=[packed],
        constraints="=r,r" if dtype.itemsize == 1 else "=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, dtype)],
    )
    return codes


def _tile(rows: int, columns: int) -> tuple[Array, Array]:
    """Which tile of a grid of [rows, columns] tiles this program computes: down a group of rows, then to the right."""
    program = pl.program_id(0)
    group, inside = lax.div(program, _GROUP * columns), lax.rem(program, _GROUP * columns)
    height = jnp.minimum(rows - group * _GROUP, _GROUP)
    return group * _GROUP + lax.rem(inside, height), lax.div(inside, height)


def _within(start, size: int, limit: int):
    """Which of [start, start + size) lie below `limit`; None if all of them do, whatever the tile."""
    return None if limit % size == 0 else start + jnp.arange(size, dtype=jnp.int32) < limit


def _both(rows, columns):
    """The mask of a tile from those of its rows and columns, each of which may be None."""
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]


def _activations(row, rows: int, start, size: int, plane: int):
    """Where the activations lie that meet plane `plane` of the packed bytes [start, start + size)."""
    if size == PLANE:
        return pl.ds(row, rows), pl.ds(start * PLANES + plane * PLANE, size)
    byte = jnp.arange(size, dtype=jnp.int32)  # of several tiles
    column = start * PLANES + lax.div(byte, PLANE) * TILE + plane * PLANE + lax.rem(byte, PLANE)
    return (row + jnp.arange(rows, dtype=jnp.int32))[:, None], column[None, :]


def _load(ref, mask=None):
    return plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=0)


def _matmul_kernel(layer, x, row_scale, packed, scale, bias, out, *, settings: Settings, interpret: bool):
    """One tile of block_m tokens times block_n channels; refs lie in global memory, None where there is no operand."""
    m, (n, width) = x.shape[0], packed.shape[-2:]
    block_m, block_n, bytes_ = settings.block_m, settings.block_n, settings.block_k // PLANES
    row, column = _tile(pl.cdiv(m, block_m), pl.cdiv(n, block_n))
    row, column = row * block_m, column * block_n
    rows, columns = pl.ds(row, block_m), pl.ds(column, block_n)
    real_rows, real_columns = _within(row, block_m, m), _within(column, block_n, n)
    stack = () if layer is None else (layer[0],)
    total = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def step(i, sums):
        start = i * bytes_
        real_bytes = _within(start, bytes_, width)
        w = _load(packed.at[*stack, columns, pl.ds(start, bytes_)], _both(real_columns, real_bytes))
        for plane in range(PLANES):
            tokens = _load(x.at[_activations(row, block_m, start, bytes_, plane)], _both(real_rows, real_bytes))
            codes = unpack_plane(w, plane, x.dtype, interpret=interpret)
            sums += lax.dot_general(codes, tokens, (((1,), (1,)), ((), ())), preferred_element_type=total)
        return sums

    sums = lax.fori_loop(0, pl.cdiv(width, bytes_), step, jnp.zeros((block_n, block_m), total))
    values = sums.astype(jnp.float32) * (_load(scale.at[*stack, columns], real_columns) / unit(x.dtype))[:, None]
    if row_scale is not None:
        values *= _load(row_scale.at[rows], real_rows)[None, :]
    if bias is not None:
        values += _load(bias.at[*stack, columns], real_columns).astype(jnp.float32)[:, None]
    plt.store(out.at[rows, columns], values.T.astype(out.dtype), mask=_both(real_rows, real_columns))


def _launch(kernel, operands: dict[str, Array | None], out: jax.ShapeDtypeStruct, grid: int, settings, interpret: bool):
    """Runs `kernel` over whole operands in global memory; an operand that is None reaches the kernel as None."""
    names = [name for name, operand in operands.items() if operand is not None]

    def body(*refs):
        given = dict(zip(names, refs, strict=False))
        kernel(*(given.get(name) for name in operands), refs[-1], settings=settings, interpret=interpret)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(grid,),
        in_specs=[anywhere] * len(names),
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=settings.num_warps, num_stages=settings.num_stages),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*(operands[name] for name in names))


def matmul(
    x: Num[Array, "m k"],
    row_scale: Float[Array, " m"] | None,
    packed: UInt8[Array, "*layers n kp"],
    scale: Float[Array, "*layers n"],
    bias: Float[Array, "*layers n"] | None,
    *,
    settings: Settings,
    out_dtype: DTypeLike,
    layer: Int[Array, ""] | None = None,
    interpret: bool = False,
) -> Num[Array, "m n"]:
    """x [m, k] times the transposed ternary weights, times their scale, plus the bias -> [m, n] in `out_dtype`.

    `packed`, `scale` and `bias` may be stacked layers, of which `layer` picks one where they lie. `interpret` runs the
    kernel on any device.
    """
    n = packed.shape[-2]
    grid = pl.cdiv(x.shape[0], settings.block_m) * pl.cdiv(n, settings.block_n)
    operands = {
        "layer": None if layer is None else layer.astype(jnp.int32)[None],
        "x": x,
        "row_scale": row_scale,
        "packed": packed,
        "scale": scale,
        "bias": bias,
    }
    out = jax.ShapeDtypeStruct((x.shape[0], n), out_dtype)
    return _launch(_matmul_kernel, operands, out, grid, settings, interpret)
