"""The straight-through layer: what it computes, what its gradients are, and that the packed layer computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_distillation import config

from flux_jax.distill import student, training
from flux_jax.distill.options import Options
from flux_jax.models.blocks import SingleStreamBlock
from flux_jax.models.layers import Linear
from flux_jax.models.quantize import ternarize
from flux_jax.models.ternary import TernaryLinear

N, K = 6, 24


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    u = rng.normal(0, 0.8, (N, K)).astype(np.float32)
    s = rng.uniform(0.05, 0.2, N).astype(np.float32)
    return u, s, rng.standard_normal((3, K)).astype(np.float32), rng.standard_normal((3, N)).astype(np.float32)


def layer(u, s, bias=None, **options):
    return student.ShadowLinear(jnp.asarray(u), jnp.log(jnp.asarray(s)), bias, **options)


def test_acts_as_its_codes_and_passes_gradients_straight_through(drawn):
    u, s, x, dy = (a.astype(np.float64) for a in drawn)
    codes = np.clip(np.rint(u), -1, 1)
    assert set(np.unique(codes)) == {-1, 0, 1}
    y, back = jax.vjp(lambda m, x: m(x), layer(*drawn[:2]), jnp.asarray(drawn[2]))
    np.testing.assert_allclose(y, x @ (codes * s[:, None]).T, rtol=2e-5, atol=1e-6)
    gradient, dx = back(jnp.asarray(drawn[3]))
    np.testing.assert_allclose(gradient.shadow[...], s[:, None] * (dy.T @ x), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.log_scale[...], (dy * y).sum(0), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(dx, dy @ (codes * s[:, None]), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_packed_layer_computes_the_same(drawn, activations):
    u, s, x, _ = drawn
    bias = jnp.arange(N, dtype=jnp.float32)
    codes, scale = student.finalize(jnp.asarray(u), jnp.log(jnp.asarray(s)))
    packed = TernaryLinear.from_codes(codes, scale, bias, activations=activations)
    ours = layer(u, s, bias, activations=activations)(jnp.asarray(x))
    np.testing.assert_allclose(ours, packed(jnp.asarray(x)), rtol=1e-5, atol=1e-5)
    exact = np.float64(x) @ (np.clip(np.rint(u), -1, 1) * s[:, None]).T + np.arange(N)
    error = np.abs(ours - exact).max()
    assert (error > 1e-4) == (activations == "int8")  # int8 must be seen to round
    assert error < 0.05


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_products_of_bfloat16_operands_round_what_is_not_exact_in_it(drawn, activations):
    """Codes and int8 rows are; a float row is not, and comes out as if it had been rounded before."""
    u, s, x, _ = map(jnp.asarray, drawn)
    y = layer(u, s, activations=activations, products="bfloat16")(x)
    rounded = x if activations == "int8" else x.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(y, layer(u, s, activations=activations)(rounded), rtol=1e-5, atol=1e-6)
    assert y.dtype == jnp.float32


def test_int8_activations_have_straight_through_gradients(drawn):
    u, s, x, dy = map(jnp.asarray, drawn)
    dx = jax.grad(lambda x: (layer(u, s, activations="int8")(x) * dy).sum())(x)
    np.testing.assert_allclose(dx, dy @ (student.codes(u) * s[:, None]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_starts_as_the_rounded_weights(drawn, weighted):
    weight = jnp.asarray(drawn[0])
    moment = jnp.linspace(0.1, 3, K) if weighted else None
    shadow, log_scale = student.initial_shadow(weight, Options(), moment)
    codes, scale = ternarize(weight, second_moment=moment)
    found = student.finalize(shadow, log_scale)
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_allclose(found[1], scale, rtol=1e-6)


def test_one_scale_for_a_matrix(drawn):
    weight = jnp.stack([jnp.asarray(drawn[0]), 3 * jnp.asarray(drawn[0])])  # two layers, stacked
    shadow, log_scale = student.initial_shadow(weight, Options(scales="tensor"))
    assert log_scale.shape == (2, 1)
    codes, scale = student.finalize(shadow, log_scale)
    assert scale.shape == (2, N)
    np.testing.assert_allclose(scale[1], 3 * scale[0], rtol=1e-5)
    expected = ternarize(weight.reshape(2, 1, -1))
    np.testing.assert_array_equal(codes, expected[0].reshape(weight.shape))


def test_every_block_linear_is_replaced_but_modulation_where_told():
    for modulation in (True, False):
        options = dataclasses.replace(Options(), modulation=modulation, activations="int8")
        block = student.student_of(
            SingleStreamBlock(config().transformer, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), "single_blocks.", options
        )
        kinds = {path[-1]: type(node) for path, node in nnx.iter_modules(block) if path}
        assert kinds["linear1"] is kinds["linear2"] is student.ShadowLinear
        assert kinds["mod"] is (student.ShadowLinear if modulation else Linear)
        assert block.linear1.activations == "int8"
        assert {v.dtype for _, v in nnx.to_flat_state(nnx.state(block))} == {jnp.dtype(jnp.float32)}


def test_a_probe_notes_the_inputs_mean_square(drawn):
    x = jnp.asarray(drawn[2])
    linear = Linear(K, N, rngs=nnx.Rngs(0))
    probe = student.Probe(linear)
    np.testing.assert_array_equal(probe(x), linear(x))
    np.testing.assert_allclose(probe.moment[...], np.square(drawn[2]).mean(0), rtol=1e-5)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    value = jnp.full(20_000, 1 + 0.3 * 2**-7, jnp.float32)  # three tenths of the way between two bfloat16 numbers
    found = training.stochastic_round(value, jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(found)) == {1.0, 1 + 2**-7}
    assert float(found.mean()) == pytest.approx(float(value[0]), abs=2**-7 * 0.015)
    exact = jnp.asarray([0.0, -1.5, 3e38], jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(training.stochastic_round(exact, jax.random.key(1)).astype(jnp.float32), exact)
