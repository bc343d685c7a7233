"""The Triton kernels in Pallas's interpreter: exact integer sums, float64 references, edges that nobody else writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pack_ternary, triton
from pallas_kernels.tiling import TileConfig

SMALL = TileConfig(block_m=32, block_n=32, block_k=128, num_warps=4, num_stages=2)


def rng(*seed):
    return np.random.default_rng(seed)


def operands(m, n, k, layers=()):
    """Activations int8, codes, scales per row and channel, bias; no scale is near zero, no row is all zeros."""
    r = rng(m, n, k)
    x = r.integers(-127, 128, (m, k)).astype(np.int8)
    codes = r.integers(-1, 2, (*layers, n, k)).astype(np.int8)
    row_scale, scale = (r.uniform(0.5, 2, shape).astype(np.float32) for shape in ((m,), (*layers, n)))
    return x, row_scale, codes, scale, r.normal(size=(*layers, n)).astype(np.float32)


def run_assembly(text, word):
    """The registers $0, $1 after a few instructions of PTX on a 32-bit word, by the instruction set's definitions."""
    registers = {}

    def value(name):
        return int(name, 0) if name[0].isdigit() else registers.get(name, word)

    for line in text.strip("{} ").replace(".reg .b32 t;", "").strip("; ").split(";"):
        operation, *names = line.replace(",", " ").split()
        a, *rest = (value(name) for name in names[1:])
        match operation:
            case "shl.b32":
                result = a << rest[0] & 0xFFFFFFFF
            case "and.b32":
                result = a & rest[0]
            case "mov.b32":
                result = a
            case "prmt.b32":
                eight = a.to_bytes(4, "little") + rest[0].to_bytes(4, "little")
                result = int.from_bytes(bytes(eight[rest[1] >> 4 * i & 0xF] for i in range(4)), "little")
        registers[names[0]] = result
    return b"".join(registers[f"${i}"].to_bytes(4, "little") for i in (0, 1) if f"${i}" in registers)


@pytest.mark.parametrize("plane", range(4))
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16", "float32"])
def test_every_byte_unpacks_to_its_codes(plane, dtype):
    every = np.arange(256, dtype=np.uint8)[None]
    pair = every.astype(int) >> 2 * plane & 3
    unused = 0 if jnp.dtype(dtype).itemsize == 2 else -2  # what the bits 10, which no packed array holds, come to
    got = triton.unpack_plane(jnp.asarray(every), plane, jnp.dtype(dtype), interpret=True)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.array([0, 1, unused, -1])[pair] * triton.unit(dtype))


@pytest.mark.parametrize("plane", range(4))
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_the_assembly_and_its_twin_agree_on_every_byte(plane, dtype):
    every = rng(plane).permutation(np.repeat(np.arange(256, dtype=np.uint8), 4))  # among other neighbours each time
    twin = np.asarray(triton.unpack_plane(jnp.asarray(every[None]), plane, jnp.dtype(dtype), interpret=True))
    text = triton.assembly(plane, dtype)
    ran = b"".join(run_assembly(text, int(word)) for word in every.view(np.uint32))
    assert ran == twin.tobytes()


@pytest.mark.parametrize(
    ("m", "n", "k", "block_k"), [(1, 32, 128, 128), (7, 40, 256, 256), (77, 72, 384, 256), (150, 64, 128, 128)]
)
def test_int8_sums_are_exact(m, n, k, block_k):
    x, _, codes, _, _ = operands(m, n, k)
    ones = jnp.ones((m,), jnp.float32), jnp.asarray(pack_ternary(codes)), jnp.ones((n,), jnp.float32)
    settings = TileConfig(16, 32, block_k, 4, 2)  # 150 rows are more tiles than one group of them holds
    got = triton.matmul(jnp.asarray(x), *ones, None, settings=settings, out_dtype=jnp.float32, interpret=True)
    np.testing.assert_array_equal(got, x.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize(("dtype", "out", "tolerance"), [("int8", "bfloat16", 4e-3), ("bfloat16", "float32", 1e-6)])
def test_scales_bias_and_layer(dtype, out, tolerance):
    x, row_scale, codes, scale, bias = operands(16, 48, 256, (3,))
    given = jnp.asarray(x).astype(dtype)
    got = triton.matmul(
        given,
        jnp.asarray(row_scale) if dtype == "int8" else None,
        *map(jnp.asarray, (pack_ternary(codes), scale, bias)),
        settings=SMALL,
        out_dtype=jnp.dtype(out),
        layer=jnp.int32(1),
        interpret=True,
    )
    want = np.asarray(given, np.float64) @ codes[1].T * scale[1] + bias[1]
    if dtype == "int8":
        want = (want - bias[1]) * row_scale[:, None] + bias[1]
    assert got.dtype == out
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_an_output_is_poisoned_until_it_is_written(monkeypatch, out):
    """The interpreter fills outputs with NaN, so that every test here sees a tile that a grid leaves out."""
    x, row_scale, codes, scale, bias = operands(40, 40, 128)
    given = [*map(jnp.asarray, (x, row_scale, pack_ternary(codes), scale, bias))]
    options = {"settings": SMALL, "out_dtype": jnp.dtype(out), "interpret": True}
    assert np.isfinite(triton.matmul(*given, **options)).all()
    launch = triton.launch
    short = lambda kernel, ins, out, grid, *rest, **more: launch(kernel, ins, out, grid - 1, *rest, **more)  # noqa: E731
    monkeypatch.setattr(triton, "launch", short)
    np.testing.assert_array_equal(np.argwhere(np.isnan(triton.matmul(*given, **options))).min(0), [32, 32])


def test_a_kernel_runs_under_jit_and_scan():
    x, row_scale, codes, scale, bias = operands(5, 128, 128, (2,))
    weights = tuple(map(jnp.asarray, (pack_ternary(codes), scale, bias)))

    @jax.jit
    def run(x):
        def body(x, layer):
            options = {"settings": SMALL, "out_dtype": jnp.float32, "interpret": True}
            y = triton.matmul(x, jnp.asarray(row_scale), *weights, layer=layer, **options)
            return jnp.clip(y, -127, 127).astype(jnp.int8), y

        return jax.lax.scan(body, x, jnp.arange(2))[1]

    sums = x
    for layer, got in enumerate(np.asarray(run(jnp.asarray(x)))):
        want = (sums.astype(np.float64) @ codes[layer].T) * row_scale[:, None] * scale[layer] + bias[layer]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-2)
        sums = np.clip(got, -127, 127).astype(np.int8)


@pytest.mark.parametrize(
    ("m", "n", "k", "unmasked"),
    # The kernel touches weights, scale and bias; the row scale and activations; and the output.
    [(33, 64, 256, 3), (64, 40, 256, 2), (33, 40, 256, 0), (64, 64, 256, 6), (64, 64, 128, 4)],
)
def test_edges_are_masked_and_whole_tiles_are_not(m, n, k, unmasked):
    """The interpreter pads an operand that is read or written beyond its end; a GPU has other arrays there."""
    x, row_scale, codes, scale, bias = operands(m, n, k)
    given = map(jnp.asarray, (x, row_scale, pack_ternary(codes), scale, bias))
    settings = TileConfig(32, 32, 256, 4, 2)
    kernel = jax.make_jaxpr(lambda *a: triton.matmul(*a, settings=settings, out_dtype=jnp.float32))(*given)
    touched = [line for line in str(kernel).splitlines() if " <- " in line]
    assert len(touched) == 6
    assert sum("mask=" not in line for line in touched) == unmasked


@pytest.mark.parametrize("large", [(2**16 + 1, 2**15), (1, 2**31 + 128)], ids=str)
def test_an_array_whose_offsets_would_wrap_is_an_error(large, snapshot_message):
    """Between 2 and 4 GiB of bytes: only the shapes are there."""
    n, kp = large
    given = [jax.ShapeDtypeStruct(*each) for each in (((1, 4 * kp), jnp.int8), ((1,), jnp.float32))]
    given += [jax.ShapeDtypeStruct((n, kp), jnp.uint8), jax.ShapeDtypeStruct((n,), jnp.float32)]
    how = {"settings": SMALL, "out_dtype": jnp.float32}
    with snapshot_message.raises(ValueError, "2,147,483,648"):
        jax.eval_shape(lambda *a: triton.matmul(*a, None, **how), *given)
    fine = [*given[:2], jax.ShapeDtypeStruct((n, kp // 2), jnp.uint8), given[3]]
    fine[0] = jax.ShapeDtypeStruct((1, 4 * (kp // 2)), jnp.int8)
    jax.eval_shape(lambda *a: triton.matmul(*a, None, **how), *fine)
