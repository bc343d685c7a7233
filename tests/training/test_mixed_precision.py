"""Mixed-precision products: what float64 gives for the rounded operands, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flux_jax.models.layers import Linear
from flux_jax.training.mixed_precision import mixed_product, use_mixed_products


def rounded(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).astype(np.float64)


def test_products_and_gradients_are_those_of_rounded_operands():
    rng = np.random.default_rng(0)
    x, weight, gradient = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, 48), (24, 48), (2, 5, 24))
    )
    y, pull = jax.vjp(mixed_product, x, weight)
    of_x, of_weight = pull(gradient)
    assert {a.dtype for a in (y, of_x, of_weight)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(y, rounded(x) @ rounded(weight).T, rtol=0, atol=2e-5)
    np.testing.assert_allclose(of_x, rounded(gradient) @ rounded(weight), rtol=0, atol=2e-5)
    np.testing.assert_allclose(of_weight, np.einsum("bto,bti->oi", rounded(gradient), rounded(x)), rtol=0, atol=2e-5)
    assert np.abs(np.asarray(y) - np.float64(x) @ np.float64(weight).T).max() > 1e-3  # bfloat16 it is


def test_every_linear_of_a_module_uses_them():
    module = nnx.Dict(one=Linear(8, 4, rngs=nnx.Rngs(0)), deep=nnx.Dict(two=Linear(4, 2, rngs=nnx.Rngs(1))))
    use_mixed_products(module)
    assert module.one.product is module.deep.two.product is mixed_product
    assert Linear(8, 4, rngs=nnx.Rngs(0)).product is not mixed_product
