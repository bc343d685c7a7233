"""Some of a product's channels, computed where the weights lie: the same numbers as in the whole product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pack_ternary, ternary_matmul

M, N, K, LAYERS = 20, 200, 130, 3


@pytest.fixture(scope="module")
def weights():
    draw = np.random.default_rng(0)
    codes = draw.integers(-1, 2, (LAYERS, N, K), np.int8)
    scale = draw.integers(8, 24, (LAYERS, N)).astype(np.float32) / 16
    bias = draw.uniform(0.5, 1.5, (LAYERS, N)).astype(np.float32)
    return pack_ternary(codes), scale, bias


@pytest.mark.parametrize("activations", ["bf16", "int8"])
@pytest.mark.parametrize(
    "channels", [(0, 77), *(pytest.param(c, marks=pytest.mark.slow) for c in ((77, N), (128, 129)))]
)
def test_channels_are_those_of_the_whole(weights, implementation, activations, channels):
    """Of a stacked layer, at bounds that no tile has."""
    x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)
    options = {"activations": activations, "implementation": implementation, "layer": jnp.int32(1)}
    whole = ternary_matmul(x, *weights, **options)
    part = ternary_matmul(x, *weights, **options, channels=channels)
    np.testing.assert_array_equal(part, whole[:, slice(*channels)])


@pytest.mark.parametrize("layer", [None, 1])
def test_gradients_reach_the_channels_that_were_asked_for(weights, layer):
    packed, scale, bias = weights if layer is not None else (a[1] for a in weights)
    x = jnp.round(4 * jax.random.normal(jax.random.key(1), (M, K))) / 4  # exact sums: the sine tells their order
    index = None if layer is None else jnp.int32(layer)

    def total(x, scale, bias, channels, pick):
        y = ternary_matmul(x, packed, scale, bias, implementation="xla", layer=index, channels=channels)
        return (jnp.sin(y[:, pick])).sum()

    found = jax.grad(total, (0, 1, 2))(x, scale, bias, (50, 120), slice(None))
    expected = jax.grad(total, (0, 1, 2))(x, scale, bias, None, slice(50, 120))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [(0, N + 1), (5, 5), (-1, 4)])
def test_channels_that_are_not_there_are_refused(weights, channels, snapshot_message):
    with snapshot_message.raises(ValueError, 200):
        ternary_matmul(jnp.ones((1, K)), *(a[0] for a in weights), channels=channels)
