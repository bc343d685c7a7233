"""Random operands: evenly spread, of the moments that they claim, and another array for another seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bench import draw

SHAPE = (200, 300)


def test_bits_are_even_and_independent():
    drawn = np.asarray(jax.jit(draw.bits, static_argnums=1)(0, SHAPE))
    each = np.unpackbits(drawn.view(np.uint8).reshape(-1, 4), axis=1).astype(float)
    assert np.abs(each.mean(0) - 0.5).max() < 5 * 0.5 / len(each) ** 0.5  # five standard errors
    assert np.abs(np.corrcoef(each.T) - np.eye(32)).max() < 5 / len(each) ** 0.5
    assert len(np.unique(drawn)) > 0.999 * drawn.size


def test_normal_has_the_moments_of_four_even_numbers():
    """Of their sum, to be exact, whose distribution is Irwin's and Hall's: an excess of kurtosis of -6 / 5 / 4."""
    drawn = np.asarray(draw.normal(1, SHAPE, jnp.float32), np.float64)
    error = drawn.size**-0.5
    assert abs(drawn.mean()) < 5 * error and abs(drawn.var() - 1) < 5 * 2**0.5 * error
    assert abs(stats.kurtosis(drawn.ravel()) + 0.3) < 5 * 24**0.5 * error
    assert 3 < np.abs(drawn).max() < 3.5
    assert draw.normal(1, SHAPE).dtype == jnp.bfloat16


def test_uniform_and_integers_are_even_within_their_limits():
    drawn = np.asarray(draw.uniform(2, SHAPE, 0.5, 2.0))
    assert stats.kstest(drawn.ravel(), "uniform", (0.5, 1.5)).pvalue > 1e-3
    whole = np.asarray(draw.integers(3, SHAPE, -1, 1))
    values, counts = np.unique(whole, return_counts=True)
    assert list(values) == [-1, 0, 1] and whole.dtype == np.int8
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("other", [1, 2**16, 2**30])
def test_seeds_neighbours_and_shapes_differ(other):
    """Neither elements side by side nor those of two seeds go together."""
    first, second = (np.asarray(draw.normal(seed, SHAPE, jnp.float32)).ravel() for seed in (0, other))
    limit = 5 / first.size**0.5
    assert abs(np.corrcoef(first, second)[0, 1]) < limit
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < limit
    assert abs(np.corrcoef(first[300:], first[:-300])[0, 1]) < limit
    np.testing.assert_array_equal(first, np.asarray(draw.normal(jnp.uint32(0), SHAPE, jnp.float32)).ravel())
