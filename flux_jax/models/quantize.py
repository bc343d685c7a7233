"""Which linears of the transformer are ternary, and how a weight matrix is rounded to codes and scales.

In: weights [..., n, k] of any floating dtype. Out: codes int8 [..., n, k] in {-1, 0, 1} and one scale per output
channel, float32 [..., n]; the layer then multiplies by codes * scale. The rule on module paths covers every linear of
every block, modulation included; embedders, the final layer and all norms keep their precision. `replace_linears` and
what builds on it turn a transformer, also an abstract one, into its ternary form. Sources: BitNet b1.58 (arXiv
2402.17764, absmean), Ternary Weight Networks (arXiv 1605.04711, least squares) with the threshold found exactly.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flux_jax.config import FluxConfig
from flux_jax.models.layers import Linear
from flux_jax.models.params import abstract_component, dotted, leaf_table
from flux_jax.models.ternary import TernaryLinear, module_at

METHODS = ("least-squares", "absmean")
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
    """`ternarize` of rows w float32 [..., n, k] by xp (numpy or jax.numpy), with sums of dtype `sums`. What is named is
    [..., n, k], too, place t - 1 of a row for its t largest weights.

    falling: sizes |w| in falling order. total: sum of the first t, times the second moments where there are some.
    count: t, or the sum of their second moments. The error falls by total^2 / count, whose largest place is `best`; at
    `best`, falling is the threshold and total / count the scale. The row [0.9, -0.1, 0.6, -0.5], without moments:

        t                  1      2      3      4
        falling          0.9    0.6    0.5    0.1
        total            0.9    1.5    2.0    2.1
        total^2 / t     0.81  1.125  1.333  1.103

    t = 3 is best: threshold 0.5, codes [1, 0, 1, -1], scale 2.0 / 3 = 0.667. The sum of squares, 1.43, falls to 0.097.
    That 0.1 is 0 and 0.5 is not agrees with the rule for this scale, |w| > 0.333.
    """
    size = xp.abs(w)
    if second_moment is None:
        falling = weighted = xp.flip(xp.sort(size, -1), -1)
        count = xp.arange(1, w.shape[-1] + 1, dtype=sums).reshape((1,) * (w.ndim - 1) + w.shape[-1:])
    else:
        moments = xp.asarray(second_moment, np.float32).reshape((1,) * (w.ndim - 1) + w.shape[-1:])
        order = xp.flip(xp.argsort(size, -1), -1)
        falling = xp.take_along_axis(size, order, -1)
        weights = xp.take_along_axis(xp.broadcast_to(moments, w.shape), order, -1)
        weighted, count = falling * weights, xp.maximum(xp.cumsum(weights, -1, dtype=sums), TINY)
    total = xp.cumsum(weighted.astype(sums), -1)  # numpy converts faster first than while it adds
    count = xp.broadcast_to(count, w.shape)
    best = xp.argmax(xp.square(total) / count, -1)[..., None]
    threshold, kept, divisor = (xp.take_along_axis(each, best, -1) for each in (falling, total, count))
    # Among equal sizes the gain is largest before or behind them all, so that a threshold tells the codes.
    codes = (w >= threshold).astype(np.int8) - (w <= -threshold).astype(np.int8)
    return codes, (kept / divisor)[..., 0].astype(np.float32)


def replace_linears(transformer: nnx.Module, change: Callable[[str, Any], nnx.Module]) -> nnx.Module:
    """The transformer with change(path, layer) in place of each layer that the rule names; all else is shared.

    Layers come as they are in the program: stacked ("double_blocks.img.qkv", leaves [L, ...]).
    """
    copy = nnx.merge(*nnx.split(transformer))
    for path, layer in list(nnx.iter_modules(copy)):
        if is_ternary(dotted(path)):
            setattr(module_at(copy, path[:-1]), str(path[-1]), change(dotted(path), layer))
    return copy


def quantize_transformer(
    transformer: nnx.Module, method: str = "least-squares", *, activations: str = "bf16"
) -> nnx.Module:
    """A transformer whose block linears are `TernaryLinear`s with rounded weights; biases and the rest are shared.

    May be traced (`jax.jit`, `nnx.eval_shape`). Nothing is trained here: FLUX rounded like this paints noise.
    """

    def change(_: str, linear: Linear) -> TernaryLinear:
        codes, scale = ternarize(linear.weight[...], method)
        bias = None if linear.bias is None else linear.bias[...]
        return TernaryLinear.from_codes(codes, scale, bias, activations=activations)

    return replace_linears(transformer, change)


def abstract_ternary(config: FluxConfig, dtype: Any = jnp.float32, *, activations: str = "bf16") -> nnx.Module:
    """The ternary transformer of a configuration with shapes for arrays; dtype: of all that is neither codes nor
    scales."""
    change = functools.partial(quantize_transformer, method="absmean", activations=activations)
    return abstract_component("transformer", config, dtype, change)


def ternary_paths(config: FluxConfig) -> dict[str, tuple[int, int]]:
    """Path of each ternary layer ("double_blocks.7.img.qkv") -> its weight's shape (n, k). FLUX.1-dev has 304:
    queries, keys and values are one matrix here, so these are 494 linears in the published files."""
    table = leaf_table(abstract_component("transformer", config))
    split = ((name.rpartition("."), shape) for name, shape in table.items())
    return {path: (shape[0], shape[1]) for (path, _, kind), shape in split if kind == "weight" and is_ternary(path)}


def quantization_report(config: FluxConfig) -> str:
    """A table of every layer of the transformer, what it becomes and how many parameters it has; totals below."""
    table = leaf_table(abstract_component("transformer", config))
    rows: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, shape in table.items():
        path, _, kind = name.rpartition(".")
        form = "ternary" if kind == "weight" and is_ternary(path) else "kept"
        rows.setdefault((form, re.sub(r"\.\d+\.", ".*.", name)), []).append(shape)
    width = max(len(name) for _, name in rows)
    lines = [
        f"{form:8}{name:{width}}  {len(shapes):3} x {list(shapes[0])!s:15}{sum(map(math.prod, shapes)):>18,}"
        for (form, name), shapes in sorted(rows.items(), key=lambda row: row[0][0] == "kept")
    ]
    linears = {name.removesuffix(".weight") for name, shape in table.items() if len(shape) == 2}
    ternary = ternary_paths(config)
    ours, published = (f"{each(ternary):,} of {each(linears):,}" for each in (len, _published))
    count, total = sum(map(math.prod, ternary.values())), sum(map(math.prod, table.values()))
    share = f"{count:,} of {total:,} parameters ({count / total:.2%})"
    return "\n".join([*lines, f"ternary: {share}, {published} linears as published, {ours} matrices here"])


def _published(paths: Iterable[str]) -> int:
    """How many linears these are in diffusers' files: queries, keys, values, a single block's MLP are apart there."""
    return sum({"qkv": 3, "linear1": 4}.get(path.rpartition(".")[2], 1) for path in paths)
