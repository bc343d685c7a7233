"""GPU kernels for FLUX, written in Pallas; jax and numpy only, and nothing from `flux_jax` or `convert`.

packing         the 2-bit layout of ternary weights: pack, unpack, validate
ternary_matmul  the product with packed weights: checks, choice of backend, gradient
reference       its XLA backend, for every device
triton          its Triton backend, for NVIDIA GPUs of compute capability 8.0 and up
triton_rows     rows of tokens rounded to int8, on the same GPUs: after a norm, or joined
fused           products and norms with what stands before and behind them in one kernel, for inference
epilogues       what a product ends with, inside its kernel
dispatch        which backend, for which device
tiling          which tiles, for which device and shape
"""

from pallas_kernels.dispatch import Target, compiling_for, current_target, supported
from pallas_kernels.packing import LAYOUT_VERSION, pack_ternary, packed_width, unpack_ternary, validate
from pallas_kernels.reference import quantize_rows
from pallas_kernels.ternary_matmul import ternary_matmul

__all__ = [
    "LAYOUT_VERSION",
    "Target",
    "compiling_for",
    "current_target",
    "pack_ternary",
    "packed_width",
    "quantize_rows",
    "supported",
    "ternary_matmul",
    "unpack_ternary",
    "validate",
]
