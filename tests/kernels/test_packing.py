"""The 2-bit layout: byte by byte as specified, its own inverse, and what is no such layout is refused."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import pack_ternary, packed_width, unpack_ternary, validate

RNG = np.random.default_rng(0)
BITS = {0: 0b00, 1: 0b01, -1: 0b11}
codes_of_any_shape = st.integers(1, 300).flatmap(
    lambda k: hnp.arrays(
        np.int8, st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(k)), elements=st.integers(-1, 1)
    )
)


def ternary(*shape):
    return RNG.integers(-1, 2, shape).astype(np.int8)


def packed_by_specification(row):
    """One row of codes -> bytes, code by code, from the text of the specification."""
    out = np.zeros(32 * -(-len(row) // 128), np.uint8)
    for i, code in enumerate(row):
        tile, plane, j = i // 128, i % 128 // 32, i % 32
        out[32 * tile + j] |= BITS[int(code)] << 2 * plane
    return out


@given(codes_of_any_shape)
def test_bytes_are_those_of_the_specification(codes):
    packed = pack_ternary(codes)
    assert packed.dtype == np.uint8 and packed.shape == (*codes.shape[:-1], packed_width(codes.shape[-1]))
    for index in np.ndindex(codes.shape[:-1]):
        np.testing.assert_array_equal(packed[index], packed_by_specification(codes[index]))


@given(codes_of_any_shape)
def test_unpacking_inverts_packing(codes):
    packed = pack_ternary(codes)
    validate(packed, codes.shape[-1])
    unpacked = unpack_ternary(packed, codes.shape[-1])
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("k", [1, 128, 200])
def test_jax_and_numpy_agree_and_stay_what_they_are(k):
    codes = ternary(2, 3, k)
    packed = jax.jit(pack_ternary)(jnp.asarray(codes))
    unpacked = jax.jit(unpack_ternary, static_argnums=1)(packed, k)
    assert isinstance(pack_ternary(codes), np.ndarray) and isinstance(
        unpack_ternary(pack_ternary(codes), k), np.ndarray
    )
    np.testing.assert_array_equal(packed, pack_ternary(codes))
    np.testing.assert_array_equal(unpacked, codes)


def test_unpacking_of_every_byte_is_the_same_everywhere():
    every = np.arange(256, dtype=np.uint8).reshape(8, 32)
    by_numpy = unpack_ternary(every, 128)
    np.testing.assert_array_equal(unpack_ternary(jnp.asarray(every), 128), by_numpy)
    two_bits = np.array([0, 1, -2, -1])
    for byte in range(256):
        row, j = divmod(byte, 32)
        assert [two_bits[byte >> 2 * p & 3] for p in range(4)] == by_numpy[row, j::32].tolist()


def test_any_whole_tiles_of_a_row_are_a_packed_row():
    codes = ternary(2, 384)
    np.testing.assert_array_equal(unpack_ternary(pack_ternary(codes)[:, 32:64], 128), codes[:, 128:256])


def test_a_large_layer_is_packed_within_the_converters_budget():
    codes = np.tile(ternary(96, 3072), (128, 1))  # 12288 x 3072
    seconds = []
    for _ in range(3):
        start = time.process_time()
        pack_ternary(codes)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("position", [0, 77, 127, 199])
def test_validation_finds_one_invalid_code(position, snapshot_message):
    packed = pack_ternary(ternary(3, 200))
    tile, plane, j = position // 128, position % 128 // 32, position % 32
    shift = 2 * plane
    packed[1, 32 * tile + j] = packed[1, 32 * tile + j] & ~np.uint8(3 << shift) | np.uint8(2 << shift)
    with snapshot_message.raises(ValueError, "packed [3, 64]", f"[1, {32 * tile + j}]"):
        validate(packed, 200)


def test_validation_finds_codes_in_the_padding(snapshot_message):
    with snapshot_message.raises(ValueError, "packed [2, 64]", 200):
        validate(pack_ternary(np.ones((2, 201), np.int8)), 200)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pack_ternary(np.full((2, 5), 2, np.int8)), "codes [2, 5] hold 2"),
        (lambda: pack_ternary(jnp.full((2, 5), -128, jnp.int8)), "codes [2, 5] hold -128"),
        (lambda: pack_ternary(np.zeros((2, 5), np.int32)), "codes is int32 [2, 5]"),
        (lambda: pack_ternary(np.zeros(5, np.int8)), "codes is int8 [5]"),
        (lambda: pack_ternary(np.zeros((2, 0), np.int8)), "k is 0"),
        (lambda: unpack_ternary(np.zeros((2, 32), np.int8), 128), "packed is int8 [2, 32]"),
        (lambda: unpack_ternary(np.zeros((2, 32), np.uint8), 129), "packed is [2, 32]"),
        (lambda: validate(np.zeros((2, 33), np.uint8), 128), "packed is [2, 33]"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_a_sentence(call, named, snapshot_message):
    with snapshot_message.raises(ValueError, named) as error:
        call()
    assert "\n" not in str(error.value)
