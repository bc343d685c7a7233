"""The 2-bit layout of ternary weights. This docstring is its specification; `LAYOUT_VERSION` names it in checkpoints.

In: codes int8 [..., n, k] in {-1, 0, +1}, a row per output channel. Out: packed uint8 [..., n, kp], four codes a byte.

    code    0 -> 00, +1 -> 01, -1 -> 11: two's complement in two bits. 10 is invalid.
    row     k is cut into tiles of TILE = 128 codes, each stored in PLANE = 32 bytes; tiles follow each other, so that
            kp = packed_width(k) = 32 ceil(k / 128). Where k is no multiple of 128, zeros fill the last tile.
    tile    planar: byte j holds, in its bits 2p and 2p + 1, code 32 p + j of the tile (j = 0..31, plane p = 0..3).
            Byte j of tile t is column 32 t + j of the packed row.

Why: `(byte << (6 - 2p)) & 0xC0`, read as int8, is 64 times the code, with no table, no subtraction and the same shift
for every byte of a plane, so that a kernel unpacks four bytes in one 32-bit word and finds the 32 activations of a
plane side by side. A tile does not depend on k: any whole tiles of a row are themselves a valid packed row, which lets
a mesh shard k. Rows are independent of each other: any slice, stack or shard over n and the leading axes is valid.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

LAYOUT_VERSION = 1  # changes whenever the bytes of the same codes would
TILE = 128  # codes
PLANE = TILE // 4  # bytes that hold a tile; codes of a plane
LOW_PAIRS = np.uint64(0x0303030303030303)
ONES = np.uint64(0x0101010101010101)

# What a caller may hand over. Dtype and shape are checked in the body, not by annotation: a wrong one is a ValueError.
AnyArray = jax.Array | np.ndarray


def packed_width(k: int) -> int:
    """Bytes of a packed row of k codes. ValueError where k < 1."""
    if k < 1:
        raise ValueError(f"k is {k}: a row holds at least one code")
    return -(-k // TILE) * PLANE


def pack_ternary(codes: AnyArray) -> AnyArray:
    """codes [..., n, k] int8 in {-1, 0, 1} -> packed [..., n, packed_width(k)] uint8; numpy in, numpy out.

    ValueError for another dtype, fewer than two axes, or a code outside {-1, 0, 1}. Codes that `jax.jit` traces have
    no values yet and are not looked at: call `validate` on the result.
    """
    check_array("codes", codes, "int8", "[..., n, k]")
    if has_values(codes) and codes.size:
        with jax.ensure_compile_time_eval():  # around it something else may be traced
            beyond = bool(codes.min() < -1 or codes.max() > 1)
        if beyond:
            wrong = np.unique(np.asarray(codes))
            wrong = wrong[np.abs(wrong.astype(np.int16)) > 1]
            raise ValueError(f"codes {list(codes.shape)} hold {wrong[0]}: a ternary code is -1, 0 or 1")
    *rows, k = codes.shape
    width = packed_width(k)
    padding = [(0, 0)] * len(rows) + [(0, 4 * width - k)]
    if isinstance(codes, np.ndarray):
        planes = _words(np.pad(codes, padding) if k != 4 * width else codes, 4) & LOW_PAIRS
        return _bytes([planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6]).reshape(*rows, width)
    bits = jnp.pad(codes, padding).view(jnp.uint8).reshape(*rows, width // PLANE, 4, PLANE)
    # Shifting drops the sign's other copies off the top of plane 3; the mask clears those of the other planes.
    parts = [(bits[..., plane, :] & jnp.uint8(3)) << jnp.uint8(2 * plane) for plane in range(4)]
    return functools.reduce(jnp.bitwise_or, parts).reshape(*rows, width)


def unpack_ternary(packed: AnyArray, k: int) -> AnyArray:
    """packed [..., n, packed_width(k)] uint8 -> codes [..., n, k] int8; numpy in, numpy out.

    The invalid bits 10 come out as -2. ValueError for another dtype or a width that is not k's.
    """
    check_packed(packed, k)
    *rows, width = packed.shape
    if isinstance(packed, np.ndarray):
        (word,) = _words(packed, 1)
        pairs = [word >> 2 * plane & LOW_PAIRS for plane in range(4)]
        # Each byte's sign, 0 or 1, times 0xFE fills the six bits above the pair; no product reaches the next byte.
        codes = _bytes([pair | (pair >> 1 & ONES) * 0xFE for pair in pairs]).view(np.int8)
    else:
        shifts = jnp.array([6, 4, 2, 0], jnp.uint8).reshape((1,) * len(rows) + (1, 4, 1))
        tiles = packed.reshape(*rows, width // PLANE, 1, PLANE)
        codes = jnp.left_shift(*jnp.broadcast_arrays(tiles, shifts)).view(jnp.int8) >> jnp.int8(6)
    return codes.reshape(*rows, 4 * width)[..., :k]


def validate(packed: AnyArray, k: int) -> None:
    """That `packed` follows the layout for rows of k codes. ValueError: dtype, width, the code 10, or padding that
    is not zero. Reads every byte, on the host: meant for weights that come from elsewhere, once, as they are read."""
    check_packed(packed, k)
    data = np.asarray(packed)
    # The bits 10: the upper bit of a pair set, the lower one not.
    invalid = (data >> np.uint8(1)) & ~data & np.uint8(0x55)
    if invalid.any():
        where = [int(i) for i in np.argwhere(invalid)[0]]
        raise ValueError(
            f"packed {list(data.shape)} holds the bits 10 in byte {where}: no code of layout {LAYOUT_VERSION}"
        )
    if k % TILE and unpack_ternary(data[..., -PLANE:], TILE)[..., k % TILE :].any():
        raise ValueError(f"packed {list(data.shape)} holds codes behind the last of its k = {k}: padding must be zero")


def check_packed(packed: AnyArray, k: int) -> None:
    """Dtype and width alone, which a traced array has, too. ValueError in one sentence."""
    check_array("packed", packed, "uint8", "[..., n, packed_width(k)]")
    if packed.shape[-1] != packed_width(k):
        expected = [*packed.shape[:-1], packed_width(k)]
        raise ValueError(
            f"packed is {list(packed.shape)}: rows of k = {k} codes take {packed_width(k)} bytes, {expected}"
        )


def _words(array: np.ndarray, planes: int) -> np.ndarray:
    """Rows of whole tiles -> [planes, words] uint64, each plane of all tiles side by side: long loops for numpy."""
    chunks = np.ascontiguousarray(array).reshape(-1).view(f"V{PLANE}").reshape(-1, planes)
    return np.ascontiguousarray(chunks.T).view(np.uint64)


def _bytes(planes: list[np.ndarray]) -> np.ndarray:
    """The inverse of `_words`: one array of words a plane -> bytes uint8 [-1], the planes of a tile side by side."""
    chunks = np.empty((planes[0].size * 8 // PLANE, len(planes)), f"V{PLANE}")
    for i, plane in enumerate(planes):
        chunks[:, i] = plane.view(chunks.dtype)
    return chunks.reshape(-1).view(np.uint8)


def check_array(name: str, array: AnyArray, dtype: str, axes: str) -> None:
    """A dtype, and at least the two axes of a matrix. ValueError in one sentence."""
    if array.dtype != dtype or array.ndim < 2:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}: expected {dtype} {axes}")


def has_values(array: AnyArray) -> bool:
    """False for what `jax.jit` and its kin trace, which has a dtype and a shape only."""
    return not isinstance(array, jax.core.Tracer)
