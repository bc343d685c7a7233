"""Decoding in strips gives the picture of a whole decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.config import VAEConfig
from flux_jax.models.vae import VAE
from flux_jax.models.vae_tiling import by_strips, rows_within
from flux_jax.sampling import programs
from flux_jax.sampling.schedule import pack_latents

SEAMLESS = 45.0  # dB of PSNR between two decodings: differences that no screen shows


def psnr(a, b) -> float:
    """Of pictures in [0, 1]."""
    return float(-10 * np.log10(np.square(np.float64(a) - np.float64(b)).mean() + 1e-20))


@pytest.fixture(scope="module")
def nano() -> VAE:
    return Checkpoint.open("nano").load("vae", dtype=jnp.float32)


@pytest.mark.slow
def test_no_seams_in_a_picture_of_nano(nano):
    """A picture at four times nano's own area, with strong contrasts: statistics of a part of it would show."""
    vae = nano
    side, factor = 256, vae.config.factor
    picture = np.full((1, side, side, 3), -1, np.float32)
    picture[:, : side // 3, :, 0], picture[:, side // 2 :, 40:90] = 1, (0.2, 0.9, -0.5)
    z = jax.jit(VAE.encode)(vae, jnp.asarray(picture)).astype(jnp.float32)
    tokens = pack_latents(z)[0]
    rows = side // factor // 2
    whole = programs.decode(vae, tokens, rows, rows)
    strips = programs.decode(vae, tokens, rows, rows, 2**18)
    assert psnr(whole, strips) > SEAMLESS + 50
    assert np.asarray(whole).std() > 0.1


def test_a_single_row_at_a_time_is_exact():
    config = VAEConfig(latent_channels=4, channels=(8, 16, 16), layers_per_block=0, norm_groups=4)
    vae = tiny_model.filled(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))), np.random.default_rng(0))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 10, 4)).astype(np.float32))
    decode = jax.jit(VAE.decode, static_argnames="strip_bytes")
    np.testing.assert_allclose(decode(vae, z, strip_bytes=1), decode(vae, z), atol=1e-5)


def test_rows_within():
    assert rows_within(12, 10, 50) == 4  # five rows would fit, but do not divide twelve
    assert rows_within(12, 10, 5) == 1
    assert rows_within(12, 10, 10**6) == 12


def test_the_mask_says_which_rows_are_real():
    x = jnp.ones((1, 6, 2, 3))
    counted = by_strips(
        lambda y, inside: jnp.broadcast_to(jnp.where(inside, 1.0, 0.0).sum() + 0 * y, y.shape), x, 2, halo=1
    )
    np.testing.assert_array_equal(counted[0, :, 0, 0], [3, 3, 4, 4, 3, 3])
