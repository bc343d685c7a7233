"""The schedule, noise, patches and positions: published values, diffusers' scheduler, and inverses."""

import jax.numpy as jnp
import numpy as np
import parity
import pytest

from flux_jax import config
from flux_jax.sampling import schedule

DEV, SCHNELL = config.dev().sampling, config.schnell().sampling
ROUNDED = 5.1e-6  # published to five decimals
FLOAT32 = 2e-7  # diffusers computes the schedule in float32


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [
        (28, [1, 0.98841, 0.97622, 0.96339], [0.19545, 0.10472, 0]),
        (50, [1, 0.99358, 0.98698, 0.98019], [0.11629, 0.06055, 0]),
    ],
)
def test_published_noise_levels_at_1024(steps, first, last):
    levels = schedule.sigmas(DEV, steps, 4096)
    assert levels.shape == (steps + 1,) and levels.dtype == np.float32
    np.testing.assert_allclose(levels[:4], first, atol=ROUNDED)
    np.testing.assert_allclose(levels[-3:], last, atol=ROUNDED)


def test_shift_depends_on_the_size():
    assert schedule.shift_mu(DEV, 4096) == pytest.approx(1.15)
    assert schedule.shift_mu(DEV, 1024) == pytest.approx(0.63)


def test_schnell_is_not_shifted():
    np.testing.assert_allclose(schedule.sigmas(SCHNELL, 4, 4096), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.reference
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
@pytest.mark.parametrize("settings", [DEV, SCHNELL, config.nano().sampling], ids=["dev", "schnell", "nano"])
def test_noise_levels_equal_diffusers(settings, tokens):
    reference = pytest.importorskip("torch_reference")
    expected = reference.run_scheduler(settings, 7, tokens)
    parity.check("schedule", schedule.sigmas(settings, 7, tokens), expected, FLOAT32)


def test_patches_follow_the_published_order():
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 4, 16)), jnp.float32)
    tokens = schedule.pack_latents(latents)
    # b c (h 2) (w 2) -> b (h w) (c 2 2), written out for one token
    row, column = 2, 1
    patch = latents[1, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # [2, 2, c]
    np.testing.assert_array_equal(tokens[1, row * 2 + column], patch.transpose(2, 0, 1).reshape(-1))
    np.testing.assert_array_equal(schedule.unpack_latents(tokens, 6, 4), latents)


def test_position_ids():
    ids = schedule.position_ids(2, 3, 2)
    assert ids.tolist() == [[0, 0, 0]] * 2 + [[0, r, c] for r in range(2) for c in range(3)]


def test_noise_is_a_function_of_the_seed_alone():
    noise = schedule.initial_noise(7, 16, 12, 16)
    assert noise.dtype == jnp.float32 and noise.shape == (16, 12, 16)
    np.testing.assert_array_equal(noise, schedule.initial_noise(7, 16, 12, 16))
    assert not np.array_equal(noise, schedule.initial_noise(8, 16, 12, 16))
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.05
