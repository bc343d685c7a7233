"""Rounding to ternary against brute force, and the rule that says which layers it is for."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convert.engine import expected
from convert.rules import FORMATS
from flux_jax.config import dev
from flux_jax.models import quantize
from flux_jax.models.params import abstract_component, leaf_table
from flux_jax.models.quantize import quantization_report, ternarize, ternary_paths

K = 6
ALL_CODES = np.array(list(itertools.product((-1, 0, 1), repeat=K)), np.float64)
rows = hnp.arrays(
    np.float32, (3, K), elements=st.floats(-4, 4, width=16, allow_subnormal=False)
)  # 16 bits: equal sizes happen
moments = hnp.arrays(np.float32, (K,), elements=st.floats(0.125, 4, width=16))


def least_error(w, m):
    """The least weighted squared error over all codes of K columns, each with its best scale."""
    products, norms = ALL_CODES @ (m * w.astype(np.float64)), np.square(ALL_CODES) @ m
    gain = np.where(norms > 0, np.square(products) / np.maximum(norms, 1e-300), 0)
    return (m * np.square(w.astype(np.float64))).sum() - gain.max()


def error(w, codes, scale, m):
    return (m * np.square(w.astype(np.float64) - codes * scale.astype(np.float64)[:, None])).sum(-1)


@settings(max_examples=50)
@given(w=rows, m=moments, weighted=st.booleans(), on_device=st.booleans())
def test_least_squares_is_the_best_of_all_codes(w, m, weighted, on_device):
    given = jnp.asarray(w) if on_device else w
    codes, scale = map(np.asarray, ternarize(given, "least-squares", second_moment=m if weighted else None))
    assert (codes.dtype, scale.dtype, codes.shape, scale.shape) == (np.int8, np.float32, w.shape, (3,))
    m = np.float64(m) if weighted else np.ones(K)
    best = np.array([least_error(row, m) for row in w])
    assert (error(w, codes, scale, m) <= best + 1e-5 * (m * np.square(w, dtype=np.float64)).sum(-1)).all()


def test_absmean_is_bitnets(monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK", 40)  # two rows at a time, the last chunk smaller
    w = np.random.default_rng(0).standard_normal((5, 17)).astype(ml_dtypes.bfloat16)
    codes, scale = ternarize(w, "absmean")
    for i, row in enumerate(w.astype(np.float64)):
        mean = np.abs(row).mean()
        assert scale[i] == pytest.approx(mean, rel=1e-6)
        assert codes[i].tolist() == [max(-1, min(1, round(x / mean))) for x in row]


@pytest.mark.parametrize("method", quantize.METHODS)
def test_layers_rows_and_devices_are_alike(method):
    """Stacked layers are rows like any other; a traced JAX array gives what numpy gives."""
    w = np.random.default_rng(1).standard_normal((2, 3, 200)).astype(np.float32)
    w[1, 2] = 0
    codes, scale = ternarize(w, method)
    assert (scale[1, 2], codes[1, 2].any()) == (0, False)
    for i, j in np.ndindex(2, 3):
        alone = ternarize(w[i, j : j + 1], method)
        assert np.array_equal(alone[0][0], codes[i, j]) and alone[1][0] == scale[i, j]
    traced = jax.jit(lambda w: ternarize(w, method))(w)
    assert np.array_equal(traced[0], codes)
    assert np.allclose(traced[1], scale, rtol=1e-6)


def test_a_method_that_is_not_there(snapshot_message):
    with snapshot_message.raises(ValueError, "median"):
        ternarize(np.zeros((1, 4), np.float32), "median")
    with snapshot_message.raises(ValueError, "second_moment", "[4]"):
        ternarize(np.zeros((1, 4), np.float32), second_moment=np.ones(3))


def test_what_is_ternary_in_flux_dev():
    """494 of 504 linears as published, 11.8 of 11.9 billion parameters; what stays is small."""
    names = {name for name, shape in leaf_table(abstract_component("transformer", dev())).items() if len(shape) == 2}
    published = expected("transformer", FORMATS["transformer"][0], dev(), dict.fromkeys(names, (84, 1)))
    ternary = ternary_paths(dev())
    count = sum(len(published[f"{path}.weight"].pieces) for path in ternary)
    assert (count, sum(len(weight.pieces) for weight in published.values())) == (494, 504)
    assert sum(map(math.prod, ternary.values())) == 11_834_228_736
    assert ternary["single_blocks.37.linear2"] == (3072, 15360)
    last = quantization_report(dev()).splitlines()[-1]
    assert last == (
        "ternary: 11,834,228,736 of 11,901,408,320 parameters (99.44%), 494 of 504 linears as published, "
        "304 of 314 matrices here"
    )
