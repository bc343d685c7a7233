"""Which linears of the transformer are ternary, and how a weight matrix is rounded to codes and scales.

In: weights [..., n, k] of any floating dtype. Out: codes int8 [..., n, k] in {-1, 0, 1} and one scale per output
channel, float32 [..., n]; the layer then multiplies by codes * scale. The rule on module paths covers every linear of
every block, modulation included; embedders, the final layer and all norms keep their precision. Sources: BitNet b1.58
(arXiv 2402.17764, absmean), Ternary Weight Networks (arXiv 1605.04711, least squares) with the threshold found exactly.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Method = Literal["least-squares", "absmean"]
METHODS: tuple[str, ...] = get_args(Method)
CHUNK = 2**18  # weights of a numpy array that a thread works on at a time: about 10 MB of intermediate results
TINY = np.finfo(np.float32).tiny  # in place of a divisor that is zero

TERNARY = re.compile(
    r"double_blocks(\.\d+)?\.(img|txt)\.(mod|qkv|proj|mlp_in|mlp_out)|single_blocks(\.\d+)?\.(mod|linear1|linear2)"
)


def is_ternary(path: str) -> bool:
    """The rule: is the module at `path` ternary? A stacked path ("double_blocks.img.qkv") or one layer's
    ("double_blocks.7.img.qkv")."""
    return TERNARY.fullmatch(path) is not None


def ternarize(w: Any, method: str = "least-squares", *, second_moment: Any = None) -> tuple[Any, Any]:
    """w [..., n, k] -> codes int8 [..., n, k] in {-1, 0, 1}, scale float32 [..., n], each row by itself.

    absmean: scale = mean |w|, codes = round(clip(w / scale, -1, 1)) (BitNet b1.58, per output channel). least-squares:
    the codes and scale with the least sum of (w - scale * code)^2 that there is. For a given scale the best code is
    sign(w) where |w| > scale / 2, so the best codes keep the t largest |w|; their best scale is the mean of these, and
    the error falls by (sum of them)^2 / t, which is maximised over all t by sorting. second_moment [k] (least-squares
    only): E[x_j^2] of the layer's inputs, which weighs the error of column j; solved exactly the same way.

    A numpy array is worked on in chunks of rows, on all cores, with float64 sums; a JAX array may be traced, its sums
    are float32. A row of zeros has scale 0. Raises ValueError for another method, or a second moment of another shape.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if second_moment is not None and (method == "absmean" or second_moment.shape != w.shape[-1:]):
        raise ValueError(f"second_moment must be [{w.shape[-1]}], as w's columns, and goes with least-squares only")
    rows = _absmean if method == "absmean" else _least_squares
    if isinstance(w, jax.Array):
        return rows(w.astype(jnp.float32), second_moment, jnp, jnp.float32)
    flat = w.reshape(-1, w.shape[-1])
    codes, scale = np.empty(flat.shape, np.int8), np.empty(len(flat), np.float32)

    def work(start: int) -> None:
        part = slice(start, start + step)
        codes[part], scale[part] = rows(flat[part].astype(np.float32), second_moment, np, np.float64)

    step = max(1, CHUNK // w.shape[-1])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets other threads run while it sorts and sums
        list(pool.map(work, range(0, len(flat), step)))
    return codes.reshape(w.shape), scale.reshape(w.shape[:-1])


def _absmean(w, _, xp, sums):
    scale = xp.abs(w).mean(-1, dtype=sums).astype(np.float32)
    divisor = xp.where(scale > 0, scale, xp.ones_like(scale))[..., None]
    return xp.rint(xp.clip(w / divisor, -1, 1)).astype(np.int8), scale


def _least_squares(w, second_moment, xp, sums):
    size = xp.abs(w)
    if second_moment is None:
        falling = xp.flip(xp.sort(size, -1), -1)
        moments = weights = xp.ones((1,) * w.ndim, np.float32)
        count = xp.arange(1, w.shape[-1] + 1, dtype=sums).reshape(*moments.shape[:-1], -1)
    else:
        moments = xp.asarray(second_moment, np.float32).reshape((1,) * (w.ndim - 1) + w.shape[-1:])
        order = xp.flip(xp.argsort(size, -1), -1)
        falling = xp.take_along_axis(size, order, -1)
        weights = xp.take_along_axis(xp.broadcast_to(moments, w.shape), order, -1)
        count = xp.maximum(xp.cumsum(weights, -1, dtype=sums), TINY)
    best = xp.argmax(xp.square(xp.cumsum(falling * weights, -1, dtype=sums)) / count, -1)[..., None]
    # Among equal sizes the gain is largest before or behind them all, so that a threshold tells the codes.
    kept = (size >= xp.take_along_axis(falling, best, -1)).astype(np.float32)
    used = kept * moments
    scale = (used * size).sum(-1, dtype=sums) / xp.maximum(used.sum(-1, dtype=sums), TINY)
    return (xp.sign(w) * kept).astype(np.int8), scale.astype(np.float32)
