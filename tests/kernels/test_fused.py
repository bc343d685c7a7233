"""The fused kernels and their XLA twins against float64, on shapes with edges; NaN goes through."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pack_ternary, triton
from pallas_kernels.epilogues import EPS, GatedResidual, Gelu, GeluQuantize, NormRope
from pallas_kernels.fused import concatenate_quantize, fused_matmul, norm_modulate_quantize
from pallas_kernels.tiling import TileConfig

TOLERANCE = 2e-5  # float32 sums and reciprocal roots, against float64


def rng(*seed):
    return np.random.default_rng(seed)


def normalized(x, shift, scale):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * (1 + scale) + shift


@pytest.mark.parametrize(("m", "d"), [pytest.param(1, 64, marks=pytest.mark.slow), (7, 96), (5, 1152)])
def test_norm_modulate_quantize(m, d, implementation):
    r = rng(m, d)
    x, shift, scale = r.normal(3, 2, (m, d)), r.normal(size=d), r.normal(size=d) / 2
    given = (jnp.asarray(a, jnp.float32) for a in (x, shift, scale))
    q, row_scale = norm_modulate_quantize(*given, implementation=implementation)
    want = normalized(x, shift, scale)
    np.testing.assert_allclose(row_scale, np.abs(want).max(-1) / 127, rtol=TOLERANCE)
    assert q.dtype == jnp.int8 and np.abs(q).max(-1).tolist() == [127] * m
    ratio = want / np.asarray(row_scale, np.float64)[:, None]
    assert np.abs(np.asarray(q, np.float64) - ratio).max() < 0.5 + 1e-3


@pytest.mark.parametrize(
    ("m", "widths"), [(1, (64,)), (5, (96, 33)), pytest.param(3, (1152, 4096), marks=pytest.mark.slow)]
)
def test_concatenate_quantize(m, widths, implementation):
    x = np.asarray(rng(m).normal(1, 2, (m, sum(widths))), np.float32)
    x[0] = 0  # a row of zeros keeps a scale above zero
    parts = jnp.split(jnp.asarray(x), np.cumsum(widths)[:-1], axis=-1)
    q, row_scale = concatenate_quantize(*parts, implementation=implementation)
    assert q.dtype == jnp.int8 and q.shape == x.shape
    assert row_scale[0] > 0 and not q[0].any()
    np.testing.assert_allclose(row_scale[1:], np.abs(x[1:]).max(-1) / 127, rtol=1e-6)
    ratio = x.astype(np.float64) / np.asarray(row_scale, np.float64)[:, None]
    assert np.abs(np.asarray(q, np.float64) - ratio).max() < 0.5 + 1e-4


@pytest.mark.parametrize("name", ["norm", "concatenate"])
def test_a_row_that_is_not_finite_says_so_in_its_scale(name, implementation):
    x = np.asarray(rng(1).normal(size=(5, 64)), np.float32)
    x[1, 3], x[2, 5], x[3, 7] = np.nan, np.inf, -np.nan
    given, how = jnp.asarray(x), {"implementation": implementation}
    if name == "norm":
        _, row_scale = norm_modulate_quantize(given, *jnp.zeros((2, 64)), **how)
    else:
        _, row_scale = concatenate_quantize(given[:, :32], given[:, 32:], **how)
    assert np.isfinite(row_scale).tolist() == [True, False, False, False, True]


def product(m, n, k):
    """Operands of an int8 product with int8-sized sums, and its value in float64."""
    r = rng(m, n, k)
    x, codes = r.integers(-127, 128, (m, k)).astype(np.int8), r.integers(-1, 2, (n, k)).astype(np.int8)
    row_scale, scale = (r.uniform(0.5, 2, size).astype(np.float32) / 30 for size in (m, n))
    bias = r.normal(size=n).astype(np.float32)
    y = (x.astype(np.float64) @ codes.T) * row_scale[:, None] * scale + bias
    return tuple(map(jnp.asarray, (x, row_scale, pack_ternary(codes), scale, bias))), y


def test_gated_residual(implementation):
    arguments, y = product(7, 40, 128)
    gate, residual = rng(2).normal(size=40).astype(np.float32), rng(3).normal(size=(7, 40)).astype(np.float32)
    epilogue = GatedResidual(jnp.asarray(gate), jnp.asarray(residual))
    got = fused_matmul(*arguments, epilogue, out_dtype=jnp.float32, implementation=implementation)
    np.testing.assert_allclose(got, residual + gate * y, rtol=TOLERANCE, atol=TOLERANCE * np.abs(y).max())


def gelu_of(y):
    return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


def test_gelu_of_some_channels(implementation):
    arguments, y = product(7, 40, 128)
    how = {"out_dtype": jnp.float32, "implementation": implementation, "channels": (16, 37)}
    expected = gelu_of(y)[:, 16:37]
    got = fused_matmul(*arguments, Gelu(), **how)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(y).max())


def test_gelu_quantize(implementation):
    arguments, y = product(7, 40, 128)
    gelu = gelu_of(y)
    step = np.float32(gelu.max() / 200)  # so that some values are beyond 127 steps
    got = fused_matmul(*arguments, GeluQuantize(jnp.asarray(step)), implementation=implementation)
    assert got.dtype == jnp.int8 and np.asarray(got).max() == 127
    assert np.abs(np.asarray(got, np.float64) - np.clip(gelu / step, -127, 127)).max() < 0.5 + 1e-2


@pytest.mark.parametrize(
    ("m", "head"), [*(pytest.param(*case, marks=pytest.mark.slow) for case in ((7, 16), (32, 16))), (7, 12)]
)
def test_norm_rotary(m, head, implementation):
    """Of two heads in the middle of the channels; a head of a width that is no tile's, too."""
    first, last = head, 3 * head
    arguments, y = product(m, 3 * head + 8, 128)
    weight = rng(4).uniform(0.5, 2, head).astype(np.float32)
    angles = rng(5).uniform(0, 6, (m, head // 2))
    rope = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    how = {"out_dtype": jnp.float32, "implementation": implementation, "channels": (first, last)}
    got = fused_matmul(*arguments, NormRope(jnp.asarray(weight), jnp.asarray(rope)), **how)
    heads = y[:, first:last].reshape(m, 2, head)
    heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + EPS) * weight
    turned = (heads[..., ::2] + 1j * heads[..., 1::2]) * np.exp(1j * angles)[:, None]
    want = np.stack([turned.real, turned.imag], axis=-1).reshape(m, 2 * head)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE * np.abs(want).max())


def test_rows_of_another_length_are_an_error(snapshot_message):
    (x, *rest), _ = product(2, 16, 128)
    with snapshot_message.raises(ValueError, "[16, 32]", 129):
        fused_matmul(jnp.pad(x, ((0, 0), (0, 1))), *rest)
    settings = TileConfig(16, 16, 128, 4, 2)
    with snapshot_message.raises(ValueError, "[2, 127]"):
        triton.matmul(x[:, :127], *rest, settings=settings, out_dtype=jnp.float32, interpret=True)
