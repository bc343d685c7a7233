"""The public product with packed ternary weights: checks, choice of backend, gradient.

In: x [..., k], packed [n, kp] uint8 (see `packing`), scale [n], bias [n]. Out: y [..., n] in x's dtype,

    y = (q @ codes.T) * row_scale * scale + bias      q, row_scale = quantize_rows(x), for activations="int8"
    y = x @ (codes * scale).T + bias                  for activations="bf16"
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import reference
from pallas_kernels.dispatch import ACTIVATIONS, choose_implementation, current_target
from pallas_kernels.packing import AnyArray, check_packed, has_values, unpack_ternary
from pallas_kernels.tiling import TileConfig, choose_tiles


class Product(NamedTuple):
    """What is fixed when a product is traced."""

    activations: str
    settings: TileConfig | None  # of the Triton kernel; None runs in XLA
    interpret: bool
    channels: tuple[int, int] | None  # of the output, from the first up to the second; None are all


def ternary_matmul(
    x: AnyArray,
    packed: AnyArray,
    scale: AnyArray,
    bias: AnyArray | None = None,
    *,
    activations: str = "bf16",
    implementation: str | None = None,
    layer: AnyArray | int | None = None,
    channels: tuple[int, int] | None = None,
) -> Float[Array, "..."]:
    """x [..., k] times ternary weights -> [..., n] in x's dtype; k, n and the number of rows are any from 1 up.

    packed: uint8 [n, packed_width(k)]; scale: floating [n]; bias: floating [n] or None. With `layer`, an integer scalar
    array, they carry a leading axis of layers of which it picks one, so that a scan over layers copies no weights.
    channels (first, last) computes those of y alone, [..., last - first], where the weights lie.
    activations: "bf16" multiplies by x as it is, in its own dtype (bfloat16, float16 or float32); "int8" quantizes each
    row of x by its largest magnitude and sums in exact integers.
    implementation: "xla", "triton", or None for what suits the device and the shape.

    Differentiable in x (straight through the rounding), scale and bias, not in packed.
    ValueError in one sentence for a wrong dtype or shape, a scale that is not finite, or an unsupported implementation.
    """
    arrays: list[Any] = [None if a is None else jnp.asarray(a) for a in (x, packed, scale, bias, layer)]
    _check(*arrays, activations=activations)
    if channels is not None and not 0 <= channels[0] < channels[1] <= arrays[1].shape[-2]:
        raise ValueError(f"channels is {channels}: expected first < last of packed's {arrays[1].shape[-2]} rows")
    plan = _plan(arrays[0], arrays[1], activations, implementation, channels)
    return _compiled(plan, *_vary_alike(arrays))


def _plan(
    x: Any, packed: Any, activations: str, implementation: str | None, channels: tuple[int, int] | None
) -> Product:
    target, (*rows, k), (first, last) = current_target(), x.shape, channels or (0, packed.shape[-2])
    m, operand = math.prod(rows), "int8" if activations == "int8" else x.dtype.name
    if choose_implementation(implementation, target, m, operand) == "xla":
        return Product(activations, None, False, channels)
    settings = choose_tiles(target, m, last - first, k, operand)
    return Product(activations, settings, target.platform == "interpret", channels)


def _check(x: Any, packed: Any, scale: Any, bias: Any, layer: Any, *, activations: str) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}: expected {' or '.join(map(repr, ACTIVATIONS))}")
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: expected bfloat16, float16 or float32 [..., k]")
    check_packed(packed, x.shape[-1])
    if layer is not None and (layer.ndim or not jnp.issubdtype(layer.dtype, jnp.integer)):
        raise ValueError(f"layer is {layer.dtype} {list(layer.shape)}: expected an integer scalar")
    if packed.ndim != (2 if layer is None else 3):
        axes = "[n, kp] without layer" if layer is None else "[layers, n, kp] with layer"
        raise ValueError(f"packed is {list(packed.shape)}: expected {axes}")
    for name, array in (("scale", scale), ("bias", bias)):
        if array is None:
            continue
        if array.shape != packed.shape[:-1] or not jnp.issubdtype(array.dtype, jnp.floating):
            expected = f"floating {list(packed.shape[:-1])}, one for each row of packed {list(packed.shape)}"
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}: expected {expected}")
    if has_values(scale) and not np.isfinite(np.asarray(scale, np.float32)).all():  # jnp would trace
        where = [int(i) for i in np.argwhere(~np.isfinite(np.asarray(scale, np.float32)))[0]]
        raise ValueError(f"scale {list(scale.shape)} is {scale[tuple(where)]} at {where}: expected finite values")


def _vary_alike(arrays: list[Any]) -> list[Any]:
    """Inside `jax.shard_map`, where types say over which mesh axes a value varies: all vary over what any does, so that
    JAX sums the gradients of those that did not."""
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays if a is not None))

    def vary(a):
        missing = tuple(axes - jax.typeof(a).manual_axis_type.varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return [None if a is None else vary(a) for a in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(plan: Product, x, packed, scale, bias, layer):
    k, width = x.shape[-1], packed.shape[-1]
    rows = x.reshape(-1, k)
    rows, row_scale = reference.quantize_rows(rows) if plan.activations == "int8" else (rows, None)
    if k != 4 * width:
        rows = jnp.pad(rows, ((0, 0), (0, 4 * width - k)))
    operands = rows, row_scale, packed, scale.astype(jnp.float32), bias
    options = {"out_dtype": x.dtype, "layer": layer, "channels": plan.channels}
    if plan.settings is None:
        y = reference.matmul(*operands, **options)
    else:
        from pallas_kernels import triton  # deprecated in JAX: not even imported where XLA does the work

        y = triton.matmul(*operands, **options, settings=plan.settings, interpret=plan.interpret)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _forward(plan: Product, x, packed, scale, bias, layer):
    return _product(plan, x, packed, scale, bias, layer), (x, packed, scale, bias, layer)


def _backward(plan: Product, saved, dy):
    x, packed, scale, bias, layer = saved
    rows = slice(*plan.channels) if plan.channels else slice(None)

    def pick(a):
        return (a if layer is None else a[layer])[rows]

    dy = dy.astype(jnp.float32)
    codes = jnp.asarray(unpack_ternary(pick(packed), x.shape[-1])).astype(x.dtype)
    dx = (dy * jnp.expand_dims(pick(scale).astype(jnp.float32), range(dy.ndim - 1))).astype(x.dtype)
    dx = reference.dot(dx, codes.T, jnp.float32).astype(x.dtype)

    def spread(gradient, like):
        """To the shape that the layers are stacked in, with zeros for channels that were not asked for."""
        gradient = gradient.astype(like.dtype)
        if layer is None and plan.channels is None:
            return gradient
        return jnp.zeros_like(like).at[rows if layer is None else (layer, rows)].set(gradient)

    leading = tuple(range(dy.ndim - 1))
    unscaled = _product(plan, x, packed, jnp.ones_like(scale), None, layer).astype(jnp.float32)
    d_scale = spread((dy * unscaled).sum(leading), scale)
    d_bias = None if bias is None else spread(dy.sum(leading), bias)
    none = np.zeros(packed.shape, jax.dtypes.float0)
    return dx, none, d_scale, d_bias, None if layer is None else np.zeros((), jax.dtypes.float0)


_product.defvjp(_forward, _backward)
_compiled = jax.jit(_product, static_argnums=0, inline=True)
