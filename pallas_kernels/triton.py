"""Ternary matrix products as Pallas Triton kernels, for NVIDIA GPUs of compute capability 8.0 and up.

In: activations x [m, k] (int8 with a scale per row, or floating), weights packed to 2 bits [n, kp] uint8 as
`pallas_kernels.packing` lays them out, a scale and a bias per channel [n]. Out: [m, n]. The unpacked weights exist in
registers alone.

A packed byte holds four codes, one of each PLANE of its K tile, as 2-bit two's complement. `(byte << (6 - 2 p)) & 0xC0`
therefore IS the int8 number 64 t of plane p, and the factor 64 goes into the channel's scale: no table, no subtraction,
no conversion. The weights are the left operand of the product, W x^T, because only that operand of a tensor-core
instruction may come from registers; the tile is turned round once, when it is stored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num, UInt8

from pallas_kernels import epilogues, reference
from pallas_kernels.packing import PLANE, TILE
from pallas_kernels.tiling import TileConfig

_GROUP = 8  # token tiles whose programs run side by side, so that they find each other's weights in the L2 cache
PLANES = TILE // PLANE
UNPACKED_BYTES = 256  # of codes that a thread holds for one product: with more, ptxas waits for each MMA by itself
WRAPS = 2**31, 2**32  # elements, and bytes: Pallas counts the elements of up to so many bytes in 32 bits with a sign


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


def unpack(packed: UInt8[Array, "n b"], dtype: DTypeLike, *, interpret: bool) -> Num[Array, "n k"]:
    """All codes of whole tiles of packed bytes in the order of a row, k = 4 b, times `unit(dtype)`.

    Joined to one operand, so that one product takes them: a barrier, a fence and a wait for each product is what holds
    a Hopper up, and the planes of a tile differ in those bits of k alone that number a thread's registers. Nothing
    moves.
    """
    (n, b), planes = packed.shape, [unpack_plane(packed, plane, dtype, interpret=interpret) for plane in range(PLANES)]
    # [n, tiles, byte, lower bit of the plane, upper bit]: `stack` takes two at a time.
    codes = lax.stack([lax.stack(planes[:2], axis=-1), lax.stack(planes[2:], axis=-1)], axis=-1)
    codes = codes.reshape(n, b // PLANE, PLANE, 2, 2)
    return jnp.transpose(codes, (0, 1, 4, 3, 2)).reshape(n, PLANES * b)


def _position(rows: int, columns: int) -> tuple[Array, Array]:
    """Which tile of a grid of [rows, columns] tiles this program computes: down a group of rows, then to the right."""
    program = pl.program_id(0)
    group, inside = lax.div(program, _GROUP * columns), lax.rem(program, _GROUP * columns)
    height = jnp.minimum(rows - group * _GROUP, _GROUP)
    return group * _GROUP + lax.rem(inside, height), lax.div(inside, height)


class Tile(NamedTuple):
    """Where a program's outputs lie. real_rows, real_columns: which of them there are, None where all are."""

    rows: Any
    columns: Any
    real_rows: Array | None
    real_columns: Array | None

    @property
    def mask(self) -> Array | None:
        return _both(self.real_rows, self.real_columns)


def _within(start, size: int, limit: int):
    """Which of [start, start + size) lie below `limit`; None if all of them do, whatever the tile."""
    return None if limit % size == 0 else start + jnp.arange(size, dtype=jnp.int32) < limit


def _both(rows, columns):
    """The mask of a tile from those of its rows and columns, each of which may be None."""
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]


def _load(ref, mask=None):
    return plt.load(ref) if mask is None else plt.load(ref, mask=mask, other=0)


def _matmul_kernel(
    layer, x, row_scale, packed, scale, bias, *refs, settings: TileConfig, interpret: bool, finish, first: int
):
    """One tile of block_m tokens times block_n channels; refs lie in global memory, None where there is no operand. The
    first column of the output is channel `first`."""
    m, n, width = *refs[-1].shape, packed.shape[-1]
    block_m, block_n, block_k = settings.block_m, settings.block_n, settings.block_k
    chunk = min(block_k, UNPACKED_BYTES * 32 * settings.num_warps // (block_n * x.dtype.itemsize)) // PLANES
    row, column = _position(pl.cdiv(m, block_m), pl.cdiv(n, block_n))
    row, column = row * block_m, column * block_n
    tile = Tile(pl.ds(row, block_m), pl.ds(column, block_n), _within(row, block_m, m), _within(column, block_n, n))
    bytes_ = block_k // PLANES
    *extra, out = refs
    stack, channels = () if layer is None else (layer[0],), pl.ds(first + column, block_n)
    total = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def step(i, sums):
        for start in (i * bytes_ + part for part in range(0, bytes_, chunk)):
            real_bytes = _within(start, chunk, width)
            w = _load(packed.at[*stack, channels, pl.ds(start, chunk)], _both(tile.real_columns, real_bytes))
            real_codes = _within(start * PLANES, chunk * PLANES, width * PLANES)
            tokens = x.at[pl.ds(row, block_m), pl.ds(start * PLANES, chunk * PLANES)]
            tokens = _load(tokens, _both(tile.real_rows, real_codes))
            codes = unpack(w, x.dtype, interpret=interpret)
            sums += reference.dot(codes, tokens, total)
        return sums

    sums = lax.fori_loop(0, pl.cdiv(width, bytes_), step, jnp.zeros((block_n, block_m), total))
    values = sums.astype(jnp.float32) * (_load(scale.at[*stack, channels], tile.real_columns) / unit(x.dtype))[:, None]
    if row_scale is not None:
        values *= _load(row_scale.at[tile.rows], tile.real_rows)[None, :]
    if bias is not None:
        values += _load(bias.at[*stack, channels], tile.real_columns).astype(jnp.float32)[:, None]
    values = finish(extra, values, tile)
    plt.store(out.at[tile.rows, tile.columns], values.astype(out.dtype), mask=tile.mask)


def _finish(refs, values, tile: Tile, *, kind: type | None, dtype: DTypeLike, interpret: bool):
    """A tile [block_n, block_m] turned round, with the epilogue `kind` of `pallas_kernels.fused`, whose operands lie in
    `refs`. What can be done before the turn is: it takes fewer registers there."""
    if kind is None:
        return values.astype(dtype).T
    if kind is epilogues.GatedResidual:
        gate, residual = refs
        gated = (values * _load(gate.at[tile.columns], tile.real_columns).astype(jnp.float32)[:, None]).T
        return _load(residual.at[tile.rows, tile.columns], tile.mask).astype(jnp.float32) + gated
    if kind is epilogues.Gelu:
        return jax.nn.gelu(values, approximate=True).astype(dtype).T
    if kind is epilogues.GeluQuantize:
        (step,) = refs
        steps = jnp.clip(jax.nn.gelu(values, approximate=True) / step[0], -127.0, 127.0)
        return to_int8(steps, interpret=interpret).T
    # In the output's dtype, as an unfused model rounds it: a float32 tile with its angles would spill.
    weight, rope = refs
    head, half = values.T.astype(dtype), rope.shape[-1]
    square = jnp.square(head.astype(jnp.float32)).sum(-1, keepdims=True)
    norm = lax.rsqrt(square / (2 * half) + epilogues.EPS)
    head = (head.astype(jnp.float32) * norm * plt.load(weight.at[:]).astype(jnp.float32)[None]).astype(dtype)
    even, odd = (part.astype(jnp.float32) for part in lax.unstack(head.reshape(-1, half, 2), axis=-1))
    sines = pl.ds(tile.rows.start + rope.shape[0] // 2, tile.rows.size)
    cos, sin = (_load(rope.at[part, :], _both(tile.real_rows, None)) for part in (tile.rows, sines))
    turned = [(even * cos - odd * sin).astype(dtype), (even * sin + odd * cos).astype(dtype)]
    return lax.stack(turned, axis=-1).reshape(head.shape)


def to_int8(values: Array, *, interpret: bool) -> Array:
    """Numbers within -127..127 rounded, halves to even, which Triton has no operation for."""
    if interpret:
        return jnp.round(values).astype(jnp.int8)
    like = jax.ShapeDtypeStruct(values.shape, jnp.int32)
    options = {"constraints": "=r,f", "pack": 1, "result_shape_dtypes": [like]}
    return plt.elementwise_inline_asm("cvt.rni.s32.f32 $0, $1;", args=[values], **options)[0].astype(jnp.int8)


def launch(
    kernel: functools.partial,
    operands: list[Array | None],
    out: Any,
    grid: int,
    interpret: bool,
    reused: int | None = None,
    **compiler: int,
):
    """Runs `kernel` over whole operands in global memory; an operand that is None reaches the kernel as None. reused:
    the index of the operand in whose place the output may be written. ValueError for an array too large for the
    offsets of its elements."""
    given = [operand for operand in operands if operand is not None]
    for array in (*given, *jax.tree.leaves(out)):
        if array.size > WRAPS[0] and array.size * array.dtype.itemsize <= WRAPS[1]:
            raise ValueError(
                f"{array.dtype} {list(array.shape)} has {array.size:,} elements, and a kernel counts them up to "
                f"{WRAPS[0]:,}: use fewer rows or layers at once, or implementation='xla'"
            )

    def body(*refs):
        left = iter(refs)
        inputs = [None if operand is None else next(left) for operand in operands]
        kernel(*inputs, *left)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(grid,),
        in_specs=[anywhere] * len(given),
        out_specs=jax.tree.map(lambda _: anywhere, out),
        compiler_params=plt.CompilerParams(**compiler),
        input_output_aliases={} if reused is None else {sum(a is not None for a in operands[:reused]): 0},
        interpret=interpret,
        name=kernel.func.__name__.removeprefix("_").removesuffix("_kernel"),
    )(*given)


def matmul(
    x: Num[Array, "m k"],
    row_scale: Float[Array, " m"] | None,
    packed: UInt8[Array, "*layers n kp"],
    scale: Float[Array, "*layers n"],
    bias: Float[Array, "*layers n"] | None,
    *,
    settings: TileConfig,
    out_dtype: DTypeLike,
    layer: Int[Array, ""] | None = None,
    channels: tuple[int, int] | None = None,
    epilogue: epilogues.Epilogue | None = None,
    interpret: bool = False,
) -> Num[Array, "m channels"]:
    """x [m, 4 kp] times the transposed ternary weights, times their scale, plus the bias -> [m, n] in `out_dtype`.

    `packed`, `scale` and `bias` may be stacked layers, of which `layer` picks one where they lie; `channels` are those
    to compute, from the first up to the second, or None for all. `epilogue` is applied to a tile before it is stored.
    `interpret` runs the kernel on any device. ValueError where x has other columns.
    """
    (m, k), (n, kp) = x.shape, packed.shape[-2:]
    first, last = channels or (0, n)
    if k != PLANES * kp:
        raise ValueError(f"x is {list(x.shape)}: packed {list(packed.shape)} needs rows of {PLANES * kp}")
    if isinstance(epilogue, epilogues.NormRope) and settings.block_n != len(epilogue.weight):
        raise ValueError(f"block_n is {settings.block_n}: expected {len(epilogue.weight)}, one head of NormRope")
    extra = [jnp.atleast_1d(a) for a in epilogue or ()]
    extra = [a.reshape(-1, a.shape[-1]) if a.ndim == 3 else a for a in extra]  # cosines, and then sines
    kind = None if epilogue is None else type(epilogue)
    finish = functools.partial(_finish, kind=kind, dtype=out_dtype, interpret=interpret)
    operands = [None if layer is None else layer.astype(jnp.int32)[None], x, row_scale, packed, scale, bias, *extra]
    # Each program reads its own tile of the residual and no other: a loop then needs no copy of what it carries.
    in_place = isinstance(epilogue, epilogues.GatedResidual) and epilogue.residual.dtype == jnp.dtype(out_dtype)
    return launch(
        functools.partial(_matmul_kernel, settings=settings, interpret=interpret, finish=finish, first=first),
        operands,
        jax.ShapeDtypeStruct((m, last - first), out_dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        pl.cdiv(m, settings.block_m) * pl.cdiv(last - first, settings.block_n),
        interpret,
        len(operands) - 1 if in_place else None,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
