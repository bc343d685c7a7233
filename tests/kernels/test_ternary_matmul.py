"""The ternary product, one battery for every backend: against float64 on fresh random numbers, never on zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pack_ternary, packed_width, quantize_rows, reference, ternary_matmul

RNG = np.random.default_rng(0)
BFLOAT16 = 1e-2  # relative: x and y are rounded to 8 bits, sums are not
FLOAT32 = 1e-5  # relative: sums of some hundred float32 products, in any order
INT8 = 2e-2  # relative: x is rounded to 1/127 of its row's largest
# Every number of rows the model has, n and k that no tile divides, and nano's smallest.
SHAPES = [(1, 48, 200), (7, 384, 128), (16, 80, 640), (77, 33, 129), (128, 128, 512), (4608, 16, 128)]
QUICK = SHAPES[0], SHAPES[3]  # tried each time; the others are slow


def cases(shapes, *before):
    """Parameters of a test, those of shapes that are not QUICK with their mark."""
    return [pytest.param(*before, shape, marks=() if shape in QUICK else pytest.mark.slow) for shape in shapes]


def weights(n, k, layers=()):
    """codes, packed, scale, bias: random, the scales of both signs and three orders of magnitude."""
    codes = RNG.integers(-1, 2, (*layers, n, k)).astype(np.int8)
    scale = RNG.standard_normal((*layers, n)) * 10 ** RNG.uniform(-2, 1, (*layers, n))
    return codes, pack_ternary(codes), scale.astype(np.float32), RNG.standard_normal((*layers, n)).astype(np.float32)


def inputs(*shape, dtype=np.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def exact(x, codes, scale, bias=0.0):
    """x @ codes.T * scale + bias in float64."""
    return np.asarray(x, np.float64) @ codes.T.astype(np.float64) * scale.astype(np.float64) + bias


def error(y, expected):
    """Root mean square of the difference over that of the values, the larger of the whole and the worst column."""
    difference = np.square(np.asarray(y, np.float64) - expected).reshape(-1, expected.shape[-1])
    square = np.square(expected).reshape(difference.shape)
    rows = len(square) >= 16  # a column's few values may happen to be next to nothing
    columns = np.sqrt(difference.mean(0) / square.mean(0)).max() if rows else 0.0
    return max(np.sqrt(difference.mean() / square.mean()), columns)


@pytest.mark.parametrize(
    ("dtype", "activations", "tolerance", "shape"),
    [
        *cases(SHAPES, "bfloat16", "bf16", BFLOAT16),
        *cases(SHAPES[1::2], "float32", "bf16", FLOAT32),
        *cases(SHAPES[::2], "bfloat16", "int8", INT8),
        ("float16", "bf16", BFLOAT16, SHAPES[3]),
    ],
)
def test_product_equals_float64(implementation, dtype, activations, tolerance, shape):
    m, n, k = shape
    codes, packed, scale, bias = weights(n, k)
    x = inputs(m, k, dtype=dtype)
    y = ternary_matmul(x, packed, scale, bias, activations=activations, implementation=implementation)
    assert y.dtype == x.dtype and y.shape == (m, n)
    assert error(y, exact(x, codes, scale, bias)) < tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gpu_rounds_the_scale_of_many_rows(dtype):
    """And nothing else: what XLA computes there is the dense product with that scale, here as on any device."""
    codes, _, scale, bias = weights(40, 256)
    x = inputs(33, 256, dtype=dtype)
    y = reference.dense_product(x, *map(jnp.asarray, (codes, scale, bias)), out_dtype=jnp.dtype("float32"))
    assert error(y, exact(x, codes, scale.astype(x.dtype), bias)) < FLOAT32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_backends_differ_by_the_rounding_of_scale_and_result(implementation, dtype):
    """Half a unit in the last place of each at most, 2**-8 in bfloat16, beside float32's own rounding of the sums."""
    codes, packed, scale, bias = weights(40, 256)
    x, half = inputs(33, 256, dtype=dtype), float(jnp.finfo(dtype).eps) / 2
    given = [jnp.asarray(a) for a in (x, codes, scale, bias)]
    dense = np.asarray(reference.dense_product(*given, out_dtype=jnp.dtype("float32")), np.float64)
    y = np.asarray(ternary_matmul(x, packed, scale, bias, implementation=implementation), np.float64)
    sums = exact(np.abs(np.asarray(x, np.float64)), np.abs(codes), np.abs(scale))
    assert (np.abs(y - dense) <= half * (sums + np.abs(y)) + FLOAT32 * sums).all()


@pytest.mark.parametrize("shape", cases(SHAPES))
def test_int8_sums_are_exact(implementation, shape):
    m, n, k = shape
    codes, packed, _, _ = weights(n, k)
    x = RNG.integers(-127, 128, (m, k))
    x[:, RNG.integers(k)] = 127  # so that each row's scale is exactly 1
    x[m // 2] = 127  # and the largest sums there can be
    codes[n // 2] = 1
    packed = pack_ternary(codes)
    y = ternary_matmul(
        jnp.asarray(x, jnp.float32), packed, jnp.ones(n), activations="int8", implementation=implementation
    )
    np.testing.assert_array_equal(y, x @ codes.T.astype(np.int64))


def test_int8_sums_of_the_longest_row_are_exact(implementation):
    codes = np.ones((16, 15360), np.int8)
    codes[:, ::3], codes[7] = RNG.integers(-1, 2, (16, 5120)), 1
    x = np.full((2, 15360), 127)
    x[1, ::2] = RNG.integers(-127, 128, 7680)
    arguments = jnp.asarray(x, jnp.float32), pack_ternary(codes), jnp.ones(16)
    y = ternary_matmul(*arguments, activations="int8", implementation=implementation)
    np.testing.assert_array_equal(y, x @ codes.T.astype(np.int64))


def test_rows_are_quantized_by_their_largest_magnitude():
    x = np.asarray(inputs(5, 300)) * np.array([[1e-4], [1.0], [1e4], [0.0], [1.0]], np.float32)
    q, scale = quantize_rows(jnp.asarray(x))
    assert q.dtype == jnp.int8 and scale.dtype == jnp.float32
    np.testing.assert_array_equal(np.abs(q).max(1), [127, 127, 127, 0, 127])
    np.testing.assert_allclose(scale, np.maximum(np.abs(x).max(1), 1e-30) / 127, rtol=1e-6)
    assert (np.abs(np.asarray(q) * np.asarray(scale)[:, None] - x) <= np.asarray(scale)[:, None] * 0.5001).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_numbers_that_are_not_finite_spoil_their_row_only(implementation, activations, bad):
    codes, _, scale, bias = weights(32, 128)
    codes[:, 5], x = 1, inputs(4, 128).at[2, 5].set(bad)
    y = ternary_matmul(x, pack_ternary(codes), scale, bias, activations=activations, implementation=implementation)
    assert np.isfinite(y).all(1).tolist() == [True, True, False, True]
    assert not np.isfinite(y[2]).any()


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_any_leading_shape_is_rows(implementation, activations):
    _, packed, scale, bias = weights(24, 128)
    x = inputs(2, 3, 5, 128)

    def product(x):
        return ternary_matmul(x, packed, scale, bias, activations=activations, implementation=implementation)

    rows = product(x.reshape(30, 128))
    np.testing.assert_allclose(product(x), rows.reshape(2, 3, 5, 24), rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(jax.vmap(product)(x), rows.reshape(2, 3, 5, 24), rtol=FLOAT32, atol=FLOAT32)
    np.testing.assert_allclose(product(x[0, 0, 0]), rows[0], rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_stacked_weights_by_scan_vmap_and_layer_index(implementation, activations):
    codes, packed, scale, bias = weights(128, 128, layers=(3,))
    x = inputs(4, 128)
    options = {"activations": activations, "implementation": implementation}
    each = [ternary_matmul(x, packed[i], scale[i], bias[i], **options) for i in range(3)]
    if activations == "bf16":
        for i in range(3):
            assert error(each[i], exact(x, codes[i], scale[i], bias[i])) < FLOAT32
    scanned = jax.lax.scan(lambda c, w: (c, ternary_matmul(x, *w, **options)), 0, (packed, scale, bias))[1]
    mapped = jax.vmap(lambda *w: ternary_matmul(x, *w, **options))(packed, scale, bias)

    def indexed(c, layer):
        return c, ternary_matmul(x, packed, scale, bias, layer=layer, **options)

    for stacked in (scanned, mapped, jax.lax.scan(indexed, 0, jnp.arange(3))[1]):
        np.testing.assert_allclose(stacked, each, rtol=FLOAT32, atol=FLOAT32)


def test_a_layer_index_reads_no_other_layer(implementation):
    codes, packed, scale, bias = weights(40, 200, layers=(3,))
    packed[[0, 2]], scale[[0, 2]], bias[[0, 2]] = 0xAA, np.nan, np.nan  # poison: the invalid code, and not a number
    x = inputs(3, 200)
    product = jax.jit(lambda *a: ternary_matmul(*a[:4], layer=a[4], implementation=implementation))
    assert error(product(x, packed, scale, bias, 1), exact(x, codes[1], scale[1], bias[1])) < FLOAT32


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_gradients(implementation, activations, layer):
    """In x straight through the rounding; in scale and bias those of what was computed; none in the packed codes."""
    codes, packed, scale, bias = weights(40, 200, layers=() if layer is None else (3,))
    x, dy = inputs(2, 3, 200), inputs(2, 3, 40)

    def product(x, packed, scale, bias):
        y = ternary_matmul(x, packed, scale, bias, layer=layer, activations=activations, implementation=implementation)
        return (y * dy).sum()

    dx, d_packed, d_scale, d_bias = jax.jit(jax.grad(product, argnums=(0, 1, 2, 3), allow_int=True))(
        x, packed, scale, bias
    )
    assert d_packed.dtype == jax.dtypes.float0 and d_packed.shape == packed.shape
    if layer is not None:
        codes, scale = codes[layer], scale[layer]
        assert d_scale.shape == d_bias.shape == (3, 40)
        assert not d_scale[::2].any() and not d_bias[::2].any()
        d_scale, d_bias = d_scale[layer], d_bias[layer]
    dy64 = np.asarray(dy, np.float64)
    assert error(dx, dy64 * scale @ codes) < FLOAT32
    seen = x
    if activations == "int8":
        q, row_scale = quantize_rows(x)
        seen = np.asarray(q) * np.asarray(row_scale)[..., None]
    unscaled = exact(seen, codes, np.ones(40))
    assert error(d_scale, (dy64 * unscaled).sum((0, 1))) < FLOAT32
    assert error(d_bias, dy64.sum((0, 1))) < FLOAT32


def test_gradient_through_a_scan_with_rematerialization(implementation):
    _, packed, scale, _ = weights(128, 128, layers=(2,))
    scale /= 10

    def chain(x, unrolled):
        def body(x, layer):
            return x + jnp.tanh(ternary_matmul(x, packed, scale, layer=layer, implementation=implementation)), None

        if unrolled:
            return body(body(x, jnp.int32(0))[0], jnp.int32(1))[0].sum()
        return jax.lax.scan(jax.checkpoint(body), x, jnp.arange(2))[0].sum()

    x = inputs(5, 128)
    np.testing.assert_allclose(jax.grad(chain)(x, False), jax.grad(chain)(x, True), rtol=1e-4, atol=1e-4)


def arguments(**changes):
    """Good arguments of a product of [2, 3, 200] with [8, 200], with some exchanged."""
    good = {"x": jnp.ones((2, 3, 200)), "packed": jnp.zeros((8, packed_width(200)), jnp.uint8), "scale": jnp.ones(8)}
    return good | {"bias": jnp.ones(8)} | changes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"x": jnp.ones((3, 200), jnp.int32)},
            "x is int32 [3, 200]",
        ),
        ({"x": jnp.float32(1)}, "x is float32 []"),
        ({"x": jnp.ones((3, 300))}, "packed is [8, 64]"),
        ({"packed": jnp.zeros((8, 64), jnp.int8)}, "packed is int8 [8, 64]"),
        ({"packed": jnp.zeros((2, 8, 64), jnp.uint8)}, "packed is [2, 8, 64]"),
        ({"layer": 0}, "packed is [8, 64]"),
        ({"layer": jnp.arange(2)}, "layer is int32 [2]"),
        (
            {"scale": jnp.ones(7)},
            "scale is float32 [7]",
        ),
        ({"scale": jnp.ones(8, jnp.int32)}, "scale is int32 [8]"),
        ({"scale": jnp.ones(8).at[3].set(jnp.nan)}, "scale [8] is nan at [3]"),
        ({"scale": jnp.ones(8).at[5].set(-jnp.inf)}, "scale [8] is -inf at [5]"),
        ({"bias": jnp.ones((1, 8))}, "bias is float32 [1, 8]"),
        ({"activations": "fp8"}, "activations is 'fp8'"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_bad_arguments_are_named_in_a_sentence(changes, named, snapshot_message):
    with snapshot_message.raises(ValueError, named) as error:
        ternary_matmul(**arguments(**changes))
    assert "\n" not in str(error.value)


def test_the_same_checks_hold_while_tracing(snapshot_message):
    traced = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arguments(scale=jnp.ones(7)).items()}
    with snapshot_message.raises(ValueError, "scale is float32 [7]"):
        jax.eval_shape(lambda given: ternary_matmul(**given), traced)
