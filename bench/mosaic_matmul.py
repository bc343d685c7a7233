"""The integer sums of a ternary product as a Pallas Mosaic GPU kernel for sm_90: what another backend could reach.

In: x int8 [m, k] and packed uint8 [n, k / 4] as `pallas_kernels.packing` lays them out. Out: [n, m] bf16, 64 times the
sums of x and the codes: no scales, no bias, no epilogue, no edges. One warpgroup loads both into shared memory by TMA;
two compute: each unpacks codes from 2 bits in registers, which are the left operand of its tensor-core products. No
barrier holds up a whole block inside the loop, as in Triton's kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.packing import PLANE, TILE

PLANES, UNIT = TILE // PLANE, 64  # an unpacked code of 1 is the int8 number 64
COMPUTING = 2  # warpgroups of a block
LOADING_REGISTERS = 40  # of a thread of the warpgroup that loads: the others get the rest
MULTIPROCESSORS = 132  # of an H100 or H200: a block for each, that goes on to its next tile


def _transforms(row_bytes: int, itemsize: int = 1) -> tuple[Any, ...]:
    """How rows of so many bytes lie in shared memory for TMA and tensor cores."""
    swizzle = min(128, row_bytes)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def _unpack_by_jax(packed: jax.Array) -> jax.Array:
    """[n, PLANE] -> [n, TILE] int8 by operations that the interpreter knows, and the compiler does not."""
    return jnp.concatenate([(packed << jnp.int8(6 - 2 * p)) & jnp.int8(-UNIT) for p in range(PLANES)], axis=1)


def _unpack_by_registers(packed: jax.Array) -> jax.Array:
    """The same four bytes at a time: a shift and a mask for each register of each plane."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    layout = plgpu.Layout.WGMMA_8BIT
    codes = plgpu.ShapeDtypeStruct((packed.shape[0], TILE), jnp.int8, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=codes)
    def unpack(_, array):
        i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
        word, quad = ir.VectorType.get((1,), i32), ir.VectorType.get((4,), i8)

        def constant(value: int) -> Any:
            return arith.constant(word, ir.DenseElementsAttr.get_splat(word, ir.IntegerAttr.get(i32, value)))

        def plane(p: int) -> np.ndarray:
            registers = np.empty_like(array.registers)
            for index, register in np.ndenumerate(array.registers):
                shifted = arith.shli(vector.bitcast(word, register), constant(6 - 2 * p))
                registers[index] = vector.bitcast(quad, arith.andi(shifted, constant(~0x3F3F3F3F)))
            return registers

        # Planes side by side: the registers of one column tile follow those of the one before.
        registers = np.concatenate([plane(p) for p in range(PLANES)], axis=1)
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=True)

    return unpack(packed)


def matmul(
    x: jax.Array,
    packed: jax.Array,
    *,
    tile_n: int = 128,
    tile_m: int = 128,
    slots: int = 4,
    warpgroup_semantics: bool = False,
    blocks: int = MULTIPROCESSORS,
    interpret: bool = False,
) -> jax.Array:
    """int8 [m, k], uint8 [n, k / 4] -> bf16 [n, m].

    tile_n: channels of a computing warpgroup; tile_m: tokens of a block; slots: steps of a tile of codes that are
    loaded ahead; blocks: of threads; warpgroup_semantics: of Pallas's two ways to lower a kernel the newer one;
    interpret: on a CPU, with races looked for. ValueError for sizes that are no multiples of the tiles.
    """
    (m, k), n = x.shape, packed.shape[0]
    block_n = COMPUTING * tile_n
    if m % tile_m or n % block_n or k % TILE or k != PLANES * packed.shape[1]:
        raise ValueError(f"{m} x {n} x {k} are no multiples of {tile_m} x {block_n} x {TILE}")
    grid = m // tile_m, n // block_n
    unpack = _unpack_by_jax if interpret else _unpack_by_registers

    def kernel(x_gmem, w_gmem, out_gmem, out_smem, codes_smem=None):
        def pipeline(body, context):
            def spec(rows: int, width: int) -> Any:
                where = {"transforms": _transforms(width), "memory_space": plgpu.SMEM}
                return plgpu.BlockSpec((rows, width), lambda step: (0, step), **where)

            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(k // TILE,),
                memory_registers=LOADING_REGISTERS,
                in_specs=[spec(block_n, PLANE), spec(tile_m, TILE)],
                wg_axis="warpgroup",
                num_compute_wgs=COMPUTING,
                max_concurrent_steps=slots,
                compute_context=context,
            )

        def nothing(*_, **__):
            return None

        allocations = pipeline(nothing, nothing).get_allocations(w_gmem, x_gmem)

        @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="warpgroup")
        def _(allocations):
            warpgroup = lax.axis_index("warpgroup")

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
            def _(loop):
                row, column = plgpu.planar_snake(loop.index[0], grid, 1, 8)
                rows = pl.ds(row * tile_m, tile_m)

                def context(run):
                    @functools.partial(pl.run_scoped, sums=plgpu.ACC((tile_n, tile_m), jnp.int32))
                    def _(sums):
                        run(sums)
                        values = sums[...].astype(jnp.float32).astype(jnp.bfloat16)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_smem[warpgroup] = values
                        plgpu.commit_smem()
                        channels = pl.ds(column * block_n + warpgroup * tile_n, tile_n)
                        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[channels, rows])

                def step(_, w_smem, x_smem, sums):
                    own = w_smem.at[pl.ds(warpgroup * tile_n, tile_n)][...]
                    if not warpgroup_semantics:
                        own = plgpu.layout_cast(own, plgpu.Layout.WGMMA_8BIT)
                    codes = unpack(own)
                    if interpret:  # whose products take nothing from registers
                        codes_smem[warpgroup] = codes
                        codes = codes_smem.at[warpgroup]
                    plgpu.wgmma(sums, codes, x_smem.T)
                    plgpu.wgmma_wait(0)
                    return sums

                whole = w_gmem.at[pl.ds(column * block_n, block_n), :], x_gmem.at[rows, :]
                pipeline(step, context)(*whole, allocations=allocations)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = plgpu.SMEM((COMPUTING, tile_n, tile_m), jnp.bfloat16, transforms=_transforms(2 * tile_m, 2))
    scratch, more = {"out_smem": out}, {}
    if interpret:
        scratch["codes_smem"] = plgpu.SMEM((COMPUTING, tile_n, TILE), jnp.int8)
        more["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    semantics = plgpu.LoweringSemantics.Warpgroup if warpgroup_semantics else plgpu.LoweringSemantics.Lane
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((n, m), jnp.bfloat16),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics),
        scratch_types=scratch,
        **more,
    )(x, lax.bitcast_convert_type(packed, jnp.int8))
