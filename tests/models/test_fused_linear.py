"""A ternary product fused with what stands around it, against the same parts one by one: values, gradients, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.models.fused_linear import gated_linear, modulated_linear
from flux_jax.models.layers import layer_norm
from flux_jax.models.ternary import TernaryLinear
from pallas_kernels import Target, compiling_for
from pallas_kernels.epilogues import Gelu, NormRope

B, T, D, N, HEADS, CUT = 2, 5, 40, 100, 32, 52  # channels: two heads of 16, some as they are, and the MLP's
ROUNDING = 1e-5  # of float32, relative to the largest value


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def ternary(d_out, activations="int8"):
    codes = jnp.asarray(np.random.default_rng(1).integers(-1, 2, (d_out, D), np.int8))
    return TernaryLinear.from_codes(codes, 1 + draw(2, d_out) / 4, draw(3, d_out), activations=activations)


def both(linear, x, shift, scale):
    parts = (HEADS, NormRope(WEIGHT, ROPE)), (CUT - HEADS, None), (N - CUT, Gelu())
    return jnp.concatenate(modulated_linear(linear, x, shift, scale, *parts), axis=-1)


def by_parts(linear, x, shift, scale):
    y = linear(layer_norm(x, 1e-6) * (1 + scale[:, None]) + shift[:, None])
    heads = y[..., :HEADS].reshape(B, T, 2, HEADS // 2)
    heads = heads * jax.lax.rsqrt(jnp.square(heads).mean(-1, keepdims=True) + 1e-6) * WEIGHT[None, None, None]
    turned = jax.lax.complex(heads[..., ::2], heads[..., 1::2]) * jax.lax.complex(*ROPE)[None, :, None]
    heads = jnp.stack([turned.real, turned.imag], axis=-1).reshape(B, T, HEADS)
    return jnp.concatenate([heads, y[..., HEADS:CUT], jax.nn.gelu(y[..., CUT:], approximate=True)], axis=-1)


def back(linear, x, gate, residual):
    return gated_linear(linear, jnp.split(x, [D // 4], axis=-1), gate, residual)


def back_by_parts(linear, x, gate, residual):
    return residual + gate[:, None] * linear(x)


WEIGHT, ANGLES = 1 + draw(8, HEADS // 2) / 4, draw(9, T, HEADS // 4)
ROPE = jnp.stack([jnp.cos(ANGLES), jnp.sin(ANGLES)])
FRONT = (both, by_parts, (3 * draw(4, B, T, D) + 1, draw(5, B, D), draw(6, B, D)))
BACK = (back, back_by_parts, (draw(4, B, T, D), draw(5, B, N), draw(6, B, T, N)))


def close(actual, expected):
    assert np.abs(np.asarray(actual - expected)).max() <= ROUNDING * np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize("activations", ["bf16", "int8"])
@pytest.mark.parametrize(("fused", "parts", "args"), [FRONT, BACK], ids=["modulated", "gated"])
def test_values_are_those_of_the_parts(fused, parts, args, activations):
    linear = ternary(N, activations)
    expected = jax.jit(parts)(linear, *args)
    close(jax.jit(fused)(linear, *args), expected)
    with compiling_for(Target("interpret", "9.0")):
        kernels = str(jax.make_jaxpr(lambda *a: fused(*a))(linear, *args)).count("pallas_call[")
        assert kernels == (1 + (1 if fused is back else 3) if activations == "int8" else 0)
        close(jax.jit(lambda *a: fused(*a))(linear, *args), expected)


@pytest.mark.parametrize(("fused", "parts", "args"), [FRONT, BACK], ids=["modulated", "gated"])
def test_gradients_are_those_of_the_parts(fused, parts, args):
    """Straight through the rounding, as of `ternary_matmul`, for the activations and all that is not packed."""
    linear, dy = ternary(N), draw(7, B, T, N)

    def gradients(product):
        def loss(scale, bias, *args):
            layer = TernaryLinear(linear.packed[...], scale, bias, d_in=D, activations="int8")
            return (product(layer, *args) * dy).sum()

        return jax.jit(jax.grad(loss, argnums=range(5)))(linear.scale[...], linear.bias[...], *args)

    for ours, theirs in zip(gradients(fused), gradients(parts), strict=True):
        assert np.abs(np.asarray(theirs)).max() > 0
        close(ours, theirs)
