"""The small layers that every part shares: Linear, Conv, Embedding, the norms, and stacks of blocks.

In and out: activations [..., channels] (images [b, h, w, channels]). Weights keep PyTorch's orientation, [out, in] and
[out, in, kh, kw], so that conversion from the published files is renaming and stacking, never a transpose.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.reference import dot, precision


def per_channel(v: Float[Array, " d"], like: Float[Array, "*b d"]) -> Float[Array, "*ones d"]:
    """v with leading axes of length one, so that it meets `like` without implicit rank promotion."""
    return v.reshape((1,) * (like.ndim - 1) + v.shape)


def product(x: Float[Array, "*b i"], weight: Float[Array, "o i"]) -> Float[Array, "*b o"]:
    """x @ weight.T in x's dtype."""
    return dot(x, weight, x.dtype)


class Linear(nnx.Module):
    """y = x @ weight.T + bias, in x's dtype. weight [out, in], bias [out] or none.

    product: what computes x @ weight.T; training may put one that rounds its operands in its place."""

    product: Callable[[Array, Array], Array] = staticmethod(product)

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        bound = d_in**-0.5
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (d_out, d_in), dtype, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = self.product(x, self.weight[...])
        return y if self.bias is None else y + per_channel(self.bias[...], y)


class Conv(nnx.Module):
    """2-D convolution, NHWC in and out, weight [out, in, k, k], bias [out] or none; `padding` as in jax.lax."""

    def __init__(
        self, d_in: int, d_out: int, kernel: int, *, stride=1, padding=None, bias=True, dtype=jnp.float32, rngs
    ):
        bound = (d_in * kernel**2) ** -0.5
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (d_out, d_in, kernel, kernel), dtype, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype)) if bias else None
        self.stride = stride
        self.padding = ((kernel // 2, kernel // 2),) * 2 if padding is None else padding

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.weight[...],
            (self.stride,) * 2,
            self.padding,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision=precision(x.dtype),
        )
        return y if self.bias is None else y + per_channel(self.bias[...], y)


class Embedding(nnx.Module):
    """Rows of weight [vocabulary, features] by id."""

    def __init__(self, vocabulary: int, features: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.weight = nnx.Param(
            jax.random.normal(rngs.params(), (vocabulary, features), dtype) * jnp.asarray(0.02, dtype)
        )

    def __call__(self, ids: Int[Array, "*b"]) -> Float[Array, "*b features"]:
        return self.weight[...][ids]


def layer_norm(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """(x - mean) / sqrt(variance + eps) over the last axis, computed in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with weight [d] and bias [d]."""

    def __init__(self, features: int, *, eps: float, dtype=jnp.float32):
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return layer_norm(x, self.eps) * per_channel(self.weight[...], x) + per_channel(self.bias[...], x)


def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """x / sqrt(mean(x^2) + eps) * weight; the quotient in float32, rounded to x's dtype before the product."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype) * per_channel(weight, x)


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight [d]."""

    def __init__(self, features: int, *, eps: float, dtype=jnp.float32):
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_norm(x, self.weight[...], self.eps)


def stack(block, count: int, *args, dtype, rngs: nnx.Rngs):
    """`count` independently initialised blocks as one module whose leaves have a leading axis of that length."""
    return nnx.vmap(lambda r: block(*args, dtype=dtype, rngs=r))(rngs.split(count))
