"""The student while it learns: linears whose float shadow weights act as ternary ones.

In: modules with `Linear` layers. Out: the same modules with `ShadowLinear` in their place, and what these become when
they are finished: codes int8 [..., n, k] and scales float32 [..., n].

A shadow weight u [n, k] is a weight in units of its row's scale s: it acts as round(clip(u, -1, 1)) * s. With the scale
taken out, a learning rate means the same for every layer of every model: the way from code 0 to code 1 has length one.
The gradient passes the rounding unchanged (straight-through estimator, arXiv 1308.3432); that of s is exact for the
codes as they stand. s is kept as its logarithm: it stays positive, and a step of Adam changes it by a share of itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int8

from flux_jax.distill.options import Options
from flux_jax.models.layers import Linear, per_channel
from flux_jax.models.params import dotted
from flux_jax.models.quantize import is_ternary, ternarize
from flux_jax.models.ternary import module_at
from flux_jax.training.mixed_precision import mixed_product
from pallas_kernels import quantize_rows
from pallas_kernels.reference import dot

LARGEST = 1.5  # of a shadow: farther out it acts alike, and would only take longer to come back
SMALLEST = 1e-12  # of a scale: a row of zeros has a logarithm, too


class ShadowWeight(nnx.Param):
    """Weights in units of their row's scale, [..., n, k]; `codes` says what they act as."""


def codes(shadow: Float[Array, "*l n k"]) -> Float[Array, "*l n k"]:
    """-1, 0 or 1, in the shadow's dtype: to the nearest, halves to 0."""
    return jnp.rint(jnp.clip(shadow, -1, 1))


def straight_through(value: Array, acts_as: Array) -> Array:
    """`acts_as`, exactly, with the gradient of `value`."""
    return jax.lax.stop_gradient(acts_as) + (value - jax.lax.stop_gradient(value))


class ShadowLinear(nnx.Module):
    """y = (x @ codes(shadow).T) * exp(log_scale) + bias, in x's dtype.

    shadow [..., n, k]; log_scale float32 [..., n], or [..., 1] for one scale per matrix; bias [..., n] or none.
    activations: "int8" rounds each row of x as `pallas_kernels.quantize_rows` does, with a straight-through gradient.
    products: "bfloat16" rounds the operands of products of float32 (codes and int8 rows are exact in it, x is not).
    rows: where y lies, its first axis being the batch's. Said here, it makes XLA gather a layer's cut weights and leave
    activations where they are, the cheaper of the two for training.
    """

    def __init__(
        self,
        shadow: Any,
        log_scale: Any,
        bias: Any = None,
        *,
        activations: str = "bf16",
        products: str = "float32",
        rows: NamedSharding | None = None,
    ):
        self.shadow = ShadowWeight(shadow)
        self.log_scale = nnx.Param(log_scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.activations, self.products, self.rows = activations, products, rows

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        operand, row_scale, shadow = x, None, self.shadow[...].astype(jnp.float32)
        if self.activations == "int8":
            integers, row_scale = quantize_rows(x)
            row_scale = jax.lax.stop_gradient(row_scale).reshape(*x.shape[:-1], 1)
            operand = straight_through(x / row_scale.astype(x.dtype), integers.astype(x.dtype))
        weight = straight_through(shadow, codes(shadow)).astype(x.dtype)
        mixed = self.products == "bfloat16" and x.dtype == jnp.float32
        y = mixed_product(operand, weight) if mixed else dot(operand, weight, jnp.float32)
        y = y * per_channel(jnp.broadcast_to(jnp.exp(self.log_scale[...]), y.shape[-1:]), y)
        if row_scale is not None:
            y = y * row_scale
        if self.bias is not None:
            y = y + per_channel(self.bias[...].astype(jnp.float32), y)
        y = y.astype(x.dtype)
        return y if self.rows is None else jax.lax.with_sharding_constraint(y, self.rows)


@functools.partial(jax.jit, static_argnames="options")
def initial_shadow(
    weight: Float[Array, "*l n k"], options: Options, second_moment: Float[Array, " k"] | None = None
) -> tuple[Float[Array, "*l n k"], Float[Array, "*l m"]]:
    """(shadow, log_scale) that act as the weights rounded by `options.method`; m is n, or 1 for one scale per matrix.

    second_moment: mean square of each input, to weigh the least squares with."""
    if options.method == "absmean":
        second_moment = None
    rows = weight.astype(jnp.float32)
    if options.scales == "tensor":
        rows = rows.reshape(*rows.shape[:-2], 1, -1)
        if second_moment is not None:
            second_moment = jnp.tile(second_moment, rows.shape[-1] // second_moment.shape[0])
    _, scale = ternarize(rows, options.method, second_moment=second_moment)
    scale = jnp.maximum(scale, SMALLEST)
    shadow = jnp.clip(rows / scale[..., None], -LARGEST, LARGEST)
    return shadow.reshape(weight.shape), jnp.log(scale)


def replace_linears_in_place(
    module: nnx.Module, prefix: str, options: Options, make: Callable[[str, Linear], nnx.Module]
):
    """`module`, changed in place: make(path, linear) stands for each linear that the student has ternary. prefix: the
    path of `module` in the transformer, such as "double_blocks.", or ""."""
    wanted = [(path, node) for path, node in nnx.iter_modules(module) if isinstance(node, Linear) and path]
    for path, linear in wanted:
        name = prefix + dotted(path)
        if is_ternary(name) and (options.modulation or path[-1] != "mod"):
            setattr(module_at(module, path[:-1]), str(path[-1]), make(name, linear))
    return module


def student_of(
    module: nnx.Module,
    prefix: str,
    options: Options,
    moments: dict[str, Array] | None = None,
    rows: NamedSharding | None = None,
) -> nnx.Module:
    """`module` (a transformer, its stacked blocks or a single block, float) as a student, rounded for a start; floats
    that stay become float32. moments: mean squares [k] of the inputs by path, where known (unstacked blocks only);
    rows: the sharding of batches."""

    def make(name: str, linear: Linear) -> ShadowLinear:
        shadow, log_scale = initial_shadow(linear.weight[...], options, (moments or {}).get(name))
        bias = None if linear.bias is None else linear.bias[...]
        return ShadowLinear(
            shadow.astype(jnp.dtype(options.shadow_dtype)),
            log_scale,
            bias,
            activations=options.activations,
            products=options.products,
            rows=rows,
        )

    student = replace_linears_in_place(module, prefix, options, make)
    wide = {ShadowWeight: jnp.dtype(options.shadow_dtype)}
    return jax.tree.map(
        lambda v: v.replace(v[...].astype(wide.get(type(v), jnp.float32))),
        student,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )


class Probe(nnx.Module):
    """A linear that notes the mean square of each input, [k], in `moment`."""

    def __init__(self, linear: Linear):
        self.linear = linear
        self.moment = nnx.Variable(jnp.zeros(linear.weight[...].shape[-1:], jnp.float32))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        flat = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        self.moment[...] = jnp.square(flat).mean(0)
        return self.linear(x)


def finalize(
    shadow: Float[Array, "*l n k"], log_scale: Float[Array, "*l m"]
) -> tuple[Int8[Array, "*l n k"], Float[Array, "*l n"]]:
    """(codes, scale) that the layer acts as."""
    scale = jnp.broadcast_to(jnp.exp(log_scale), shadow.shape[:-1])
    return codes(shadow.astype(jnp.float32)).astype(jnp.int8), scale
