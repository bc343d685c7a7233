"""The matrix products of FLUX's blocks as things to measure: shapes, random operands, what is right.

In: a `FluxConfig`. Out: `shapes`, every (n, k) of a ternary layer with the names of its layers; `layers` and
`model_products`, which product a step runs how often, and what it ends with; operands of one of them, made on the
device; `expected`, some rows of what is right, computed there by XLA in float32, which knows nothing of the kernels;
`judged`, how far a result is from it.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import draw
from flux_jax.config import FluxConfig
from flux_jax.models.quantize import ternary_paths
from pallas_kernels import epilogues, pack_ternary, quantize_rows, unpack_ternary

CHECKED_ROWS = 64  # of a result, compared with what is right
# Largest error over the largest value. bfloat16 rounds a result by up to 2**-9 of itself, and an epilogue rounds up to
# three times; the sums of bf16 products are float32, whose rounding is below that; the integer sums are exact, and
# their error is that of the output alone; tensor cores add the products of fp8 with some 14 bits.
LIMITS = {"bf16": 1e-2, "int8": 2**-8, "fp8": 2e-2}
E4M3_LARGEST = 448.0


class Layer(NamedTuple):
    """A layer that is ternary. m: its tokens; parts: what a ternary layer is cut into, (channels, epilogue) each;
    calls: how often a step of the denoising loop runs it."""

    name: str
    m: int
    k: int
    parts: tuple[tuple[int, str], ...]
    calls: int

    @property
    def n(self) -> int:
        return sum(width for width, _ in self.parts)


class Product(NamedTuple):
    """What a kernel computes at once: a part of a layer, by the name of its epilogue (`pallas_kernels.dispatch`)."""

    m: int
    n: int
    k: int
    epilogue: str
    calls: int
    layers: tuple[str, ...]


def shapes(config: FluxConfig) -> dict[tuple[int, int], list[str]]:
    """(n, k) of every ternary layer -> the layers that have it, "double_blocks.img.qkv"."""
    found: dict[tuple[int, int], list[str]] = {}
    for path, shape in ternary_paths(config).items():
        name = re.sub(r"\.\d+\.", ".", path)
        if name not in found.setdefault(shape, []):
            found[shape].append(name)
    return dict(sorted(found.items()))


def layers(config: FluxConfig) -> list[Layer]:
    """The ternary layers of a step, for a picture of the default size, as `flux_jax.models.blocks` runs them."""
    model, text = config.transformer, config.sampling.max_sequence_length
    d, hidden, image = model.hidden_size, model.mlp_dim, math.prod(config.default_grid)
    qkv, back = ((d, "norm_rotary"), (d, "norm_rotary"), (d, "none")), ((d, "gated_residual"),)
    single, double = model.num_single_blocks, model.num_double_blocks
    found = [
        Layer("single_blocks.linear1", image + text, d, (*qkv, (hidden, "gelu")), single),
        Layer("single_blocks.linear2", image + text, d + hidden, back, single),
    ]
    for stream, m in (("img", image), ("txt", text)):
        found += [
            Layer(f"double_blocks.{stream}.qkv", m, d, qkv, double),
            Layer(f"double_blocks.{stream}.proj", m, d, back, double),
            Layer(f"double_blocks.{stream}.mlp_in", m, d, ((hidden, "gelu"),), double),
            Layer(f"double_blocks.{stream}.mlp_out", m, hidden, back, double),
        ]
    return found


def modulations(config: FluxConfig, steps: int) -> list[Layer]:
    """The ternary layers that run once a picture, before its loop, on the vectors of all steps at once."""
    d = config.transformer.hidden_size
    widths = {"double_blocks.img": 6, "double_blocks.txt": 6, "single_blocks": 3}
    return [Layer(f"{name}.mod", steps, d, ((width * d, "none"),), 0) for name, width in widths.items()]


def model_products(config: FluxConfig, steps: Sequence[int] = ()) -> list[Product]:
    """The distinct products of ternary layers in a step, those with the most work in it first, and those of the
    modulation for each number of `steps`, whose calls are 0."""
    found: dict[tuple[int, int, int, str], tuple[int, tuple[str, ...]]] = {}
    for layer in [*layers(config), *(layer for count in steps for layer in modulations(config, count))]:
        for width, epilogue in layer.parts:
            key = layer.m, width, layer.k, epilogue
            calls, names = found.get(key, (0, ()))
            found[key] = calls + layer.calls, tuple(dict.fromkeys((*names, layer.name)))
    products = [Product(*key, *value) for key, value in found.items()]
    return sorted(products, key=lambda p: (-p.calls * p.m * p.n * p.k, -p.m * p.n * p.k))


@functools.partial(jax.jit, static_argnums=(0, 1))
def tokens(m: int, k: int) -> jax.Array:
    """bf16 [m, k]; nothing in them is zero."""
    return draw.normal(0, (m, k))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def weights(kind: str, n: int, k: int) -> dict[str, jax.Array]:
    """Random weights, "dense" (weight bf16 [n, k]) or "packed" (packed uint8, scale float32 [n]), and a bias bf16 [n],
    with which the product of `tokens` has values around 1."""
    bias = draw.normal(1, (n,))
    if kind == "dense":
        return {"weight": draw.normal(2, (n, k)) * jnp.bfloat16(k**-0.5), "bias": bias}
    scale = draw.uniform(3, (n,), 0.5 * k**-0.5, 1.5 * k**-0.5)
    return {"packed": pack_ternary(draw.integers(4, (n, k), -1, 1)), "scale": scale, "bias": bias}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def epilogue_operands(name: str, m: int, n: int, head: int) -> epilogues.Epilogue | None:
    """The epilogue of that name with random operands, for m tokens and n channels; head: channels of a head."""
    if name == "gated_residual":
        return epilogues.GatedResidual(draw.normal(5, (n,)), draw.normal(6, (m, n)))
    if name == "norm_rotary":
        angles = draw.uniform(7, (m, head // 2), 0, 6)
        weight = draw.uniform(8, (head,), 0.5, 2, jnp.bfloat16)
        return epilogues.NormRope(weight, jnp.stack([jnp.cos(angles), jnp.sin(angles)]))
    if name == "gelu_quantize":
        return epilogues.GeluQuantize(jnp.float32(0.05))
    return epilogues.Gelu() if name == "gelu" else None


@functools.partial(jax.jit, static_argnums=0)
def rounded(activations: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bf16 [m, k] as the product meets it, in the type of its activations, and the scale float32 [m] of each row."""
    if activations == "int8":
        return quantize_rows(x)
    if activations == "fp8":
        row_scale = jnp.maximum(jnp.abs(x).max(-1).astype(jnp.float32), 1e-30) / E4M3_LARGEST
        return (x.astype(jnp.float32) / row_scale[:, None]).astype(jnp.float8_e4m3fn), row_scale
    return x, jnp.ones(len(x), jnp.float32)


def exact_sums(x: jax.Array, codes: jax.Array) -> jax.Array:
    """x [m, k] @ codes [n, k].T by XLA in float32 at full precision: exact for whole numbers with sums below 2**24."""
    both = x.astype(jnp.float32), codes.astype(jnp.float32)
    return jax.lax.dot_general(*both, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def expected(
    activations: str, x: Any, weights: dict[str, jax.Array], epilogue: Any = None, calls: int = 1
) -> jax.Array:
    """`CHECKED_ROWS` rows of the product, spread over all, with its epilogue: float32, on the device.

    x: bf16 [m, k], which is rounded to the activations' type first, for what that costs is no error of a kernel; or, as
    `rounded` gives them, rows with their scales. calls: how often a product is added to the residual, in bf16.
    """
    kept = checked_rows(len(x[0] if isinstance(x, tuple) else x))
    rows, row_scale = (part[kept] for part in x) if isinstance(x, tuple) else rounded(activations, x[kept])
    match epilogue:
        case epilogues.GatedResidual(gate, residual):
            epilogue = epilogues.GatedResidual(gate, residual[kept])
        case epilogues.NormRope(weight, rope):
            epilogue = epilogues.NormRope(weight, rope[:, kept])
    return _expected(rows, row_scale, weights, epilogue, calls)


@functools.partial(jax.jit, static_argnums=4)
def _expected(rows, row_scale, weights, epilogue, calls):
    plain = "weight" in weights
    y = exact_sums(rows, weights["weight"] if plain else unpack_ternary(weights["packed"], rows.shape[1]))
    y = y if plain else y * row_scale[:, None] * weights["scale"][None]
    y = y + weights["bias"].astype(jnp.float32)[None]
    if isinstance(epilogue, epilogues.GatedResidual):
        for _ in range(calls - 1):
            epilogue = epilogue._replace(residual=epilogues.finish(y, epilogue).astype(jnp.bfloat16))
    return epilogues.finish(y, epilogue)


def judged(y: jax.Array, right: jax.Array, limit: float) -> dict[str, Any]:
    """The error of a result, and whether it is within a limit."""
    wrong = error(y, right)
    return {"error": wrong, "correct": wrong <= limit}


def error(y: jax.Array, right: jax.Array) -> float:
    """Largest error of y [m, n] over the largest value, on the rows of `expected`; infinite where y is not finite."""
    return float(relative_error(y[checked_rows(len(y))], right))


@jax.jit
def relative_error(found: jax.Array, right: jax.Array) -> jax.Array:
    """The same of all rows, of arrays of one shape, as a scalar; right: float32."""
    found = found.astype(jnp.float32)
    return jnp.where(jnp.isfinite(found).all(), jnp.abs(found - right).max() / jnp.abs(right).max(), jnp.inf)


def checked_rows(m: int) -> np.ndarray:
    return np.unique(np.linspace(0, m - 1, CHECKED_ROWS).astype(int))
