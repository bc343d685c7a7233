"""The tiles that `bench.tune` tries, and the products that it tries them for.

In: a `FluxConfig`, the dtype of the activations. Out: `wanted`, products of the model; `candidates`, settings of the
Triton kernel for one of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import jax.numpy as jnp

from bench.products import Product, epilogue_operands, model_products
from flux_jax.config import FluxConfig
from pallas_kernels import current_target, packed_width
from pallas_kernels.dispatch import FLOATING_ROWS
from pallas_kernels.fused import epilogue_tiles
from pallas_kernels.tiling import GEMV_ROWS, TileConfig

OPERANDS = {"int8": "int8", "bfloat16": "bf16"}  # dtype of the activations that meet the weights -> kind of activations
STEPS = (28, 1)  # of a picture, which are the tokens of its modulation
SHARED_BYTES = 227 * 1024  # of a block of threads on the largest GPU: more never compiles
ACCUMULATORS = (64, 128)  # float32 or int32 registers a thread keeps for its tile: fewer idle, more spill
# The most tokens -> block_m, block_n, block_k, warps, stages. Many tokens: the widest tile that does not spill; twice
# the work between two barriers; two blocks of one warpgroup on a multiprocessor, which fill each other's waits; other
# depths of the pipeline. Fewer tokens: narrower tiles, so that there is one for each multiprocessor.
TRIES = {
    GEMV_ROWS: [
        (16, 64, 512, 4, 3),
        (16, 32, 512, 4, 4),
        (16, 128, 512, 8, 3),
        (16, 64, 256, 4, 4),
        (16, 32, 1024, 4, 3),
    ],
    64: [(32, 128, 256, 8, 3), (32, 64, 256, 4, 3), (32, 64, 512, 4, 3), (32, 128, 256, 4, 3), (32, 128, 512, 8, 2)],
    FLOATING_ROWS: [
        (128, 128, 256, 8, 3),
        (128, 128, 256, 4, 3),
        (64, 128, 256, 4, 3),
        (64, 256, 256, 4, 3),
        (128, 256, 256, 8, 3),
        (64, 64, 256, 4, 4),
    ],
    math.inf: [
        (128, 256, 256, 8, 3),
        (128, 256, 512, 8, 2),
        (64, 256, 256, 4, 3),
        (128, 128, 256, 8, 3),
        (128, 128, 256, 4, 3),
        (128, 128, 512, 8, 2),
        (128, 256, 256, 8, 4),
        (64, 128, 256, 4, 3),
        (64, 256, 256, 8, 3),
        (256, 128, 256, 8, 3),
    ],
}


def wanted(config: FluxConfig, operand: str) -> list[Product]:
    """The products to tune, those with the most work first; of several that one row of the table serves, the first.

    Floating activations reach the kernel with few tokens only, and what follows the product is done apart.
    """
    products = model_products(config, STEPS)
    if operand != "int8":
        products = [p._replace(epilogue="none") for p in products if p.m <= FLOATING_ROWS]
    found: list[Product] = []
    for product in products:
        alike = [p for p in found if (p.n, p.k, p.epilogue) == (product.n, product.k, product.epilogue)]
        if not any(p.m <= 2 * product.m and product.m <= 2 * p.m for p in alike):
            found.append(product)
    return found


def candidates(product: Product, operand: str, head: int, everything: bool = False) -> list[TileConfig]:
    """Settings that may suit a product, without the one that it has. everything: all that fill tensor cores, registers
    and shared memory, and no more, hundreds of them."""
    if not everything:
        tries = next(tries for most, tries in TRIES.items() if product.m <= most)
    elif product.m <= GEMV_ROWS:
        tries = itertools.product((16,), (16, 32, 64, 128), (128, 256, 512, 1024), (1, 2, 4, 8), (2, 4))
    else:
        tries = itertools.product((64, 128, 256), (64, 128, 256), (128, 256, 512), (4, 8), (2, 3, 4))
    own = own_settings(product, operand, head)
    found = [TileConfig(*values) for values in tries]
    if product.epilogue == "norm_rotary":  # a tile is a head
        found = [dataclasses.replace(settings, block_n=head) for settings in found]
    suiting = fits if not everything else suits
    return [s for s in dict.fromkeys(found) if s != own and suiting(s, product, operand)]


def fits(settings: TileConfig, product: Product, operand: str) -> bool:
    """Its steps end with the row, its tokens are not mostly padding, its parts fit the shared memory."""
    block_m, block_n, block_k, _, stages = dataclasses.astuple(settings)
    if 4 * packed_width(product.k) % block_k or block_m > max(64, product.m):
        return False
    packed_tile, tile = block_n * block_k // 4, block_m * block_k * jnp.dtype(operand).itemsize
    return stages * tile + (stages - 1) * packed_tile <= SHARED_BYTES


def suits(settings: TileConfig, product: Product, operand: str) -> bool:
    """Fits, and no thread has too little to do, or more than its registers hold."""
    threads = 32 * settings.num_warps
    if product.m <= GEMV_ROWS:
        enough = 8 <= settings.block_n * settings.block_k // 4 // threads <= 64
    else:
        enough = ACCUMULATORS[0] <= settings.block_m * settings.block_n // threads <= ACCUMULATORS[1]
    return enough and fits(settings, product, operand)


def own_settings(product: Product, operand: str, head: int) -> TileConfig:
    """What the product is run with now."""
    epilogue = epilogue_operands(product.epilogue, 1, 1, head)
    return epilogue_tiles(current_target(), *product[:3], operand, epilogue)


def tile(settings: Iterable[int]) -> str:
    """A setting's numbers for people: 128x256x256x8x3."""
    return "x".join(map(str, settings))
