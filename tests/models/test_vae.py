"""The autoencoder against diffusers' AutoencoderKL, through the converter, and what its callers count on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_model
from flax import nnx

from flux_jax.config import VAEConfig, dev
from flux_jax.models.vae import VAE

BF16 = 3e-2  # relative RMS error: rounding to 8 bits in each of a few dozen layers
TINY = VAEConfig(latent_channels=4, channels=(8, 16, 16), layers_per_block=1, norm_groups=4)


def pictures(config, batch=2, height=48, width=64):
    """Noise in [-1, 1], float32 [batch, height, width, 3]."""
    shape = (batch, height, width, config.image_channels)
    return np.random.default_rng(5).uniform(-1, 1, shape).astype(np.float32)


def latents(config, batch=2, height=6, width=8):
    return np.random.default_rng(6).normal(size=(batch, height, width, config.latent_channels)).astype(np.float32)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((8, 16, 24, 24), id="four levels"),
        pytest.param((12, 8), id="two levels", marks=pytest.mark.slow),
    ],
)
def pair(request):
    """(tests.torch_reference, its module with random weights, the VAE converted from it)."""
    torch_reference = pytest.importorskip("torch_reference")
    from published import load_module

    config = torch_reference.tiny()
    config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, channels=request.param))
    reference = torch_reference.build("vae", config)
    return torch_reference, reference, load_module("vae", config, torch_reference.state_dict_numpy(reference))


@pytest.fixture(scope="module")
def vae():
    return tiny_model.filled(nnx.eval_shape(lambda: VAE(TINY, rngs=nnx.Rngs(0))), np.random.default_rng(0))


# Compiled: run operation by operation, each of the many shapes would be a program of its own.
decode, encode, moments = jax.jit(VAE.decode), jax.jit(VAE.encode), jax.jit(VAE.moments)


@pytest.mark.reference
def test_decode_parity(pair):
    torch_reference, reference, vae = pair
    z = latents(vae.config)
    parity.check("VAE decode", decode(vae, jnp.asarray(z)), torch_reference.run_vae_decode(reference, z))


@pytest.mark.reference
def test_encode_parity(pair):
    torch_reference, reference, vae = pair
    images = pictures(vae.config)
    mean, log_variance = torch_reference.run_vae_moments(reference, images)
    ours = moments(vae, jnp.asarray(images))
    parity.check("VAE encode", ours[0], mean)
    parity.check("VAE encode", ours[1], log_variance)
    normalised = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    parity.check("VAE encode", encode(vae, jnp.asarray(images)), normalised)


def test_bfloat16_stays_close(vae):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), vae)
    z = jnp.asarray(latents(TINY))
    exact, rounded = decode(vae, z), decode(half, z)
    assert rounded.dtype == jnp.bfloat16
    difference = rounded.astype(jnp.float32) - exact
    assert float(jnp.sqrt(jnp.square(difference).mean() / jnp.square(exact).mean())) < BF16


def test_encode_samples_around_the_mode(vae):
    images = jnp.asarray(pictures(TINY))
    _, log_variance = moments(vae, images)
    mode = encode(vae, images)
    draws = jnp.stack([encode(vae, images, jax.random.key(i)) for i in range(8)])
    units = (draws - mode[None]) / (TINY.scaling_factor * jnp.exp(0.5 * log_variance))[None]
    assert abs(float(units.mean())) < 0.05
    assert abs(float(units.std()) - 1) < 0.05
    np.testing.assert_array_equal(encode(vae, images, jax.random.key(0)), draws[0])


def test_pictures_of_a_batch_do_not_mix(vae):
    z = jnp.asarray(latents(TINY))
    np.testing.assert_allclose(decode(vae, z)[1:], decode(vae, z[1:]), atol=1e-5)


def test_sizes_follow_the_configuration(vae, snapshot_message):
    images = jnp.asarray(pictures(TINY, 1, 20, 36))
    z = encode(vae, images)
    assert z.shape == (1, 5, 9, 4)
    assert decode(vae, z).shape == images.shape
    with snapshot_message.raises(ValueError, 4):
        encode(vae, images[:, :18])


def test_full_size_parameter_count():
    """FLUX.1's own autoencoder, as published (the sum over the shapes in its file)."""
    state = nnx.state(nnx.eval_shape(lambda: VAE(dev().vae, rngs=nnx.Rngs(0))))
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(state)) == 83_819_683


def test_groups_must_divide_channels(snapshot_message):
    with snapshot_message.raises(ValueError, "groups"):
        VAE(dataclasses.replace(TINY, norm_groups=3), rngs=nnx.Rngs(0))
