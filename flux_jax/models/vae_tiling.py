"""Large activations in strips: a convolution over a picture that never holds more than a few rows in float32.

In: activations [b, h, w, c], a function of a few rows of them, and a budget in bytes. Out: what the function gives for
all rows at once, exactly: strips overlap by the reach of the kernel, and whatever depends on the whole picture (the
statistics of a group norm, the keys of attention) is computed from the whole picture before, never from a strip. So
there are no seams to blend, unlike with tiles that are decoded apart.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

STRIP_BYTES = 2**26  # of a strip's activations in float32; below this a strip no longer fills a GPU

Piece = Callable[[Float[Array, "b r w c"], Bool[Array, "1 r 1 1"]], Float[Array, "b r2 w2 o"]]


def rows_within(height: int, row_bytes: int, budget: int) -> int:
    """The most rows that divide `height` and stay within `budget` bytes; at least one."""
    divisors = (rows for rows in range(1, height + 1) if height % rows == 0)
    return max(rows for rows in divisors if rows == 1 or rows * row_bytes <= budget)


def by_strips(
    piece: Piece, x: Float[Array, "b h w c"], rows: int, *, halo: int = 1, factor: int = 1
) -> Float[Array, "b h2 w2 o"]:
    """`piece` over strips of `rows` rows (a divisor of h), joined: [b, factor * h, w2, o].

    `piece` gets [b, rows + 2 halo, w, c] with a mask of the rows inside the picture, and returns `factor` rows for
    each; those made from the halo are dropped.
    """
    b, height, _, _ = x.shape

    def strip(start: Array) -> Array:
        index = start + jnp.arange(-halo, rows + halo)
        inside = ((index >= 0) & (index < height))[None, :, None, None]
        y = piece(jnp.take(x, index, axis=1, mode="clip"), inside)
        return y[:, halo * factor : (halo + rows) * factor]

    def body(i: Array, joined: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(joined, strip(i * rows), i * rows * factor, axis=1)

    out = jax.eval_shape(strip, 0)
    # Filled with a value of x, not with zeros: XLA would make all buffers of a program's zeros before they are needed.
    joined = jnp.broadcast_to(x[0, 0, 0, 0].astype(out.dtype), (b, factor * height, *out.shape[2:]))
    return jax.lax.fori_loop(0, height // rows, body, joined)
