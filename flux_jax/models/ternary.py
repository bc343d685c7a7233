"""The linear layer whose weights are -1, 0 or +1 times a scale per output channel, held at two bits each.

In: activations [..., d_in]. Out: [..., d_out] in their dtype. The packed codes go to `pallas_kernels.ternary_matmul` as
they lie in memory; the unpacked matrix never exists. Leaves may carry a leading axis of layers, as every leaf of a
stacked block does: under `jax.vmap` the layer sees its own, under `scan_blocks` it is told which one that is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels import pack_ternary, ternary_matmul, unpack_ternary
from pallas_kernels.dispatch import ACTIVATIONS
from pallas_kernels.epilogues import Epilogue
from pallas_kernels.fused import fused_matmul


class PackedTernary(nnx.Variable):
    """Codes packed to two bits, uint8 [..., n, packed_width(k)]; `pallas_kernels.packing` specifies the layout."""


class TernaryLinear(nnx.Module):
    """y = x @ (codes * scale).T + bias, in x's dtype.

    packed uint8 [..., n, packed_width(d_in)], scale float32 [..., n], bias [..., n] or none. activations: "bf16" takes
    x as it is, in its own floating dtype; "int8" rounds each row of x to int8 with a scale of its own, and then sums
    integers exactly. ValueError for other activations. `implementation` may be set to "xla" or "triton", for a
    comparison of the two; None takes what suits the device and the shape.
    """

    implementation: str | None = None

    def __init__(self, packed: Any, scale: Any, bias: Any = None, *, d_in: int, activations: str = "bf16"):
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}")
        self.packed = PackedTernary(packed)
        self.scale = nnx.Param(scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.d_in, self.activations = d_in, activations
        self.layer = nnx.data(None)  # where the leaves are those of all layers: this one's index

    @classmethod
    def from_codes(cls, codes: Any, scale: Any, bias: Any = None, *, activations: str = "bf16") -> "TernaryLinear":
        """codes int8 [..., n, k] in {-1, 0, 1}, scale float32 [..., n], bias [..., n]. ValueError: other codes."""
        return cls(pack_ternary(codes), scale, bias, d_in=codes.shape[-1], activations=activations)

    def __call__(self, x: Float[Array, "*b i"], channels: tuple[int, int] | None = None) -> Float[Array, "*b o"]:
        """channels: those of the output to compute, from the first up to the second; None are all."""
        bias = None if self.bias is None else self.bias[...]
        how = {"activations": self.activations, "implementation": self.implementation, "layer": self.layer}
        return ternary_matmul(x, self.packed[...], self.scale[...], bias, channels=channels, **how)

    @property
    def d_out(self) -> int:
        return self.packed.shape[-2]

    def of_rows(
        self,
        rows: Int8[Array, "m i"],
        row_scale: Float32[Array, " m"],
        dtype: Any,
        epilogue: Epilogue | None = None,
        channels: tuple[int, int] | None = None,
    ) -> Float[Array, "m o"]:
        """The same of rows that are int8 already, rows * row_scale[:, None], in `dtype`, with an epilogue of
        `pallas_kernels.fused`. Has no gradients."""
        operands = self.packed[...], self.scale[...], None if self.bias is None else self.bias[...], epilogue
        how = {"layer": self.layer, "channels": channels, "implementation": self.implementation}
        return fused_matmul(rows, row_scale, *operands, out_dtype=dtype, **how)

    def dense(self, dtype: Any = jnp.float32) -> Array:
        """The weight matrix that this layer stands for, codes * scale, [..., n, k]."""
        codes = jnp.asarray(unpack_ternary(self.packed[...], self.d_in))
        return (codes.astype(jnp.float32) * self.scale[...][..., None]).astype(dtype)


def module_at(module: Any, path: tuple) -> Any:
    """The submodule at a path of `nnx.iter_modules`."""
    for name in path:
        module = getattr(module, str(name))
    return module


def scan_blocks(step: Callable, carry: Any, blocks: nnx.Module, *each: Any, unroll: bool = False) -> Any:
    """The last carry of carry = step(carry, block, *slices) over stacked blocks and whatever else has a leading axis of
    layers.

    A scan hands each layer a slice of every leaf. XLA would copy it in front of a kernel, every weight at every step of
    the sampler: so the leaves of ternary layers stay outside, whole, and each layer gets its index instead. `unroll`
    writes the layers out: longer to compile, and gradients need no stack of what each layer leaves for them.
    """
    paths = [path for path, module in nnx.iter_modules(blocks) if isinstance(module, TernaryLinear)]
    definition, whole, sliced = nnx.split(blocks, lambda path, _: tuple(path[:-1]) in paths, ...)

    def body(carry, layer):
        index, leaves, slices = layer
        block = nnx.merge(definition, whole, leaves)
        for path in paths:
            module_at(block, path).layer = index
        return step(carry, block, *slices), None

    count = jax.tree.leaves(each)[0].shape[0]
    return jax.lax.scan(body, carry, (jnp.arange(count), sliced, each), unroll=unroll)[0]
