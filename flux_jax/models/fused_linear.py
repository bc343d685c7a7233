"""The products of a transformer's block, each with what stands before or behind it.

In: tokens [b, t, d] with a block's modulation vectors [b, d], and a linear of either kind. Out: tokens [b, t, n].

A `Linear`, and a `TernaryLinear` whose activations keep their own type, do the parts one by one. Where a ternary layer
rounds its activations to int8, the parts are kernels of `pallas_kernels.fused`: one goes over the tokens once for norm,
modulation and rounding, whatever the number of products behind it; one joins what a product takes and rounds it; and a
product ends with its GELU, the norm and the rotary turn of its heads, or gate and residual, so that its own output is
never in memory. Those have no gradients: who takes
gradients gets the parts one by one.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.models.attention import apply_rope
from flux_jax.models.layers import layer_norm, rms_norm
from flux_jax.models.ternary import TernaryLinear
from pallas_kernels.epilogues import EPS, GatedResidual, Gelu, NormRope
from pallas_kernels.fused import concatenate_quantize, norm_modulate_quantize


def modulate(x: Float[Array, "b t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b t d"]:
    """layer_norm(x) * (1 + scale) + shift: adaptive layer norm (DiT, section 3.2)."""
    return layer_norm(x, EPS) * (1 + scale[:, None]) + shift[:, None]


def modulated_linear(
    linear: nnx.Module,
    x: Float[Array, "b t d"],
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
    *parts: tuple[int, Gelu | NormRope | None],
) -> list[Array]:
    """linear(modulate(x, shift, scale)) cut into parts: how many channels each has, and what is done with them.

    A ternary layer computes each part apart, so that none waits in memory for another to be used: 80 to 100 MB less at
    the peak of a 1024 x 1024 picture.
    """
    bounds = list(pairwise(accumulate((width for width, _ in parts), initial=0)))

    def apart(held, x, shift, scale):
        linear, then = held
        y = modulate(x, shift, scale)
        if isinstance(linear, TernaryLinear):
            ys = [linear(y, channels) for channels in bounds]
        else:
            ys = jnp.split(linear(y), [last for _, last in bounds[:-1]], axis=-1)
        return [_finished(y, epilogue) for y, epilogue in zip(ys, then, strict=True)]

    def fused(held, x, shift, scale):
        linear, then = held
        rows = norm_modulate_quantize(x, shift, scale, implementation=linear.implementation)
        return [linear.of_rows(*rows, x.dtype, e, channels) for e, channels in zip(then, bounds, strict=True)]

    return _either(fused, apart, linear)((linear, [epilogue for _, epilogue in parts]), x, shift, scale)


def _finished(y: Float[Array, "b t n"], epilogue: Gelu | NormRope | None) -> Float[Array, "b t n"]:
    """`pallas_kernels.epilogues.finish`, rounded to y's dtype in between as a model in floating point rounds."""
    match epilogue:
        case Gelu():
            return jax.nn.gelu(y, approximate=True)
        case NormRope(weight, rope):
            heads = y.reshape(*y.shape[:2], -1, weight.shape[0])
            return apply_rope(rms_norm(heads, weight, EPS), rope).reshape(y.shape)
    return y


def gated_linear(
    linear: nnx.Module,
    parts: Sequence[Float[Array, "b t _"]],
    gate: Float[Array, "b d"],
    residual: Float[Array, "b t d"],
) -> Float[Array, "b t d"]:
    """residual + gate * linear(concatenate(parts)): the way back into the residual stream.

    parts: the layer's inputs side by side, [b, t, i] in all. A ternary layer rounds them where they lie.
    """

    def apart(linear, parts, gate, residual):
        return residual + gate[:, None] * linear(jnp.concatenate(parts, axis=-1))

    def fused(linear, parts, gate, residual):
        rows = concatenate_quantize(*parts, implementation=linear.implementation)
        return linear.of_rows(*rows, residual.dtype, GatedResidual(gate, residual))

    return _either(fused, apart, linear)(linear, tuple(parts), gate, residual)


def _either(fused: Callable, apart: Callable, linear: nnx.Module) -> Callable:
    """`fused`, of one picture, for each of a batch, where the layer has int8 activations and nobody takes a gradient;
    else `apart`, of the batch."""
    if not isinstance(linear, TernaryLinear) or linear.activations != "int8":
        return apart

    def forward(*args: Any) -> Any:
        return jax.vmap(fused, in_axes=(None, 0, 0, 0))(*args)

    either = jax.custom_vjp(forward)
    either.defvjp(lambda *args: jax.vjp(apart, *args), lambda pullback, dy: pullback(dy))
    return either
