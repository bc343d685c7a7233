"""The products of a transformer's block, each with what stands before or behind it.

In: tokens [b, t, d] with a block's modulation vectors [b, d], and a linear of either kind. Out: tokens [b, t, n].

A `Linear`, and a `TernaryLinear` whose activations keep their own type, do one thing after the other (`_separate_...`).
Where a ternary layer rounds its activations to int8, they are kernels of `pallas_kernels.fused` (`_fused_...`): one
goes over the tokens once for norm, modulation and rounding, whatever the number of products behind it; one joins what a
product takes and rounds it; and a product ends with its GELU, the norm and rope of its heads, or gate and residual, so
that its own output is never in memory. Those have no gradients: who takes gradients gets the separate way.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

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
    *slices: tuple[int, Gelu | NormRope | None],
) -> list[Array]:
    """linear(modulate(x, shift, scale)) cut into slices: how many channels each has, and what is done with them.

    A ternary layer computes each slice apart, so that none waits in memory for another to be used: 80 to 100 MB less at
    the peak of a 1024 x 1024 picture.
    """
    bounds = tuple(pairwise(accumulate((width for width, _ in slices), initial=0)))
    layer = linear, [epilogue for _, epilogue in slices]  # one argument: gradients reach the epilogues' weights, too
    separate = functools.partial(_separate_modulated, bounds)
    if not has_fused_kernels(linear):
        return separate(layer, x, shift, scale)
    return _differentiable(functools.partial(_fused_modulated, bounds), separate)(layer, x, shift, scale)


def gated_linear(
    linear: nnx.Module,
    slices: Sequence[Float[Array, "b t _"]],
    gate: Float[Array, "b d"],
    residual: Float[Array, "b t d"],
) -> Float[Array, "b t d"]:
    """residual + gate * linear(concatenate(slices)): the way back into the residual stream.

    slices: the layer's inputs side by side, [b, t, i] in all. A ternary layer rounds them where they lie.
    """
    if not has_fused_kernels(linear):
        return _separate_gated(linear, tuple(slices), gate, residual)
    return _differentiable(_fused_gated, _separate_gated)(linear, tuple(slices), gate, residual)


def has_fused_kernels(linear: nnx.Module) -> bool:
    """Whether the layer rounds its activations to int8, which `pallas_kernels.fused` is for."""
    return isinstance(linear, TernaryLinear) and linear.activations == "int8"


def _separate_modulated(bounds, layer, x, shift, scale):
    linear, epilogues = layer
    y = modulate(x, shift, scale)
    if isinstance(linear, TernaryLinear):
        ys = [linear(y, channels) for channels in bounds]
    else:
        ys = jnp.split(linear(y), [last for _, last in bounds[:-1]], axis=-1)
    return [_finished(y, epilogue) for y, epilogue in zip(ys, epilogues, strict=True)]


def _fused_modulated(bounds, layer, x, shift, scale):
    """Of one picture, [t, d]."""
    linear, epilogues = layer
    rows = norm_modulate_quantize(x, shift, scale, implementation=linear.implementation)
    return [linear.of_rows(*rows, x.dtype, e, channels) for e, channels in zip(epilogues, bounds, strict=True)]


def _finished(y: Float[Array, "b t n"], epilogue: Gelu | NormRope | None) -> Float[Array, "b t n"]:
    """`pallas_kernels.epilogues.finish`, rounded to y's dtype in between as a model in floating point rounds."""
    match epilogue:
        case Gelu():
            return jax.nn.gelu(y, approximate=True)
        case NormRope(weight, rope):
            heads = y.reshape(*y.shape[:2], -1, weight.shape[0])
            return apply_rope(rms_norm(heads, weight, EPS), rope).reshape(y.shape)
    return y


def _separate_gated(linear, slices, gate, residual):
    return residual + gate[:, None] * linear(jnp.concatenate(slices, axis=-1))


def _fused_gated(linear, slices, gate, residual):
    """Of one picture, [t, d]."""
    rows = concatenate_quantize(*slices, implementation=linear.implementation)
    return linear.of_rows(*rows, residual.dtype, GatedResidual(gate, residual))


def _differentiable(kernels: Callable, separate: Callable) -> Callable:
    """`kernels`, of one picture, for each of a batch; where gradients are taken, values and gradients of `separate`.
    Both take the layer, which is the same for all pictures, and three arguments more."""
    both = jax.custom_vjp(jax.vmap(kernels, in_axes=(None, 0, 0, 0)))
    both.defvjp(lambda *args: jax.vjp(separate, *args), lambda pullback, dy: pullback(dy))
    return both
