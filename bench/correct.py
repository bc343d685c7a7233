"""`python -m bench.correct`: whether this GPU computes with the kernels what XLA computes without them.

In: a GPU (or, with --tiny, any device: small cases, interpreted). Out: a row for each case, "wrong" in it where a
result is further off than its rounding allows, differs from one run to the next (a race), or where some element was
not written: memory is full of NaN before. Whole matrices of integer sums, exact; every product of the model as it runs
it, with its epilogue; edges, stacked layers, other tiles, all types of activations; norms and the rounding of rows.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import products, report
from bench.journal import Journal
from bench.summary import is_problem
from bench.tiles import tile
from bench.timing import device_for
from flux_jax.config import FluxConfig, dev, nano
from flux_jax.errors import UserError
from pallas_kernels import current_target, epilogues, fused, ternary_matmul, unpack_ternary
from pallas_kernels.tiling import EPILOGUES, TileConfig, choose_tiles

Job = Callable[[], dict[str, Any]]
RUNS = 4  # of each program: whatever moves between them is a race
THREADS = 12  # compiling is most of the time
LEAST_SECONDS = 3.0  # of a case
TILINGS = ((128, 256, 512, 8, 2), (64, 256, 256, 4, 3), (128, 128, 256, 4, 3), (128, 256, 256, 8, 4))
# Largest error over the largest value, against XLA's float32. bfloat16 rounds by up to 2**-9 of a value; norm and turn
# round in between, too, and add two rounded numbers. Two roundings to int8 may part where a number lies between two.
ROUNDED, TURNED, PARTED = {"error": 2**-8}, {"error": 2**-6}, {"largest": 1, "differ": 0.01}
FLOATS = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5}


def verdict(found: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """What was found, with "wrong" where it is not within its limits, or moved from one run to the next."""
    beyond = [name for name, limit in {**limits, "moved": 0}.items() if not found[name] <= limit]
    return found | ({"wrong": ", ".join(f"{name} {found[name]:.3g}" for name in beyond)} if beyond else {})


def runs(program: Callable[[], Any], like: Any) -> tuple[Any, int]:
    """The first result of several runs, and how many elements of the others are not the same. like: an array of the
    result's shape: so much memory is filled with NaN before, where the results will lie in all likelihood."""
    jax.block_until_ready([jnp.full(like.shape, jnp.nan, jnp.float32) for _ in range(2)])
    first, *others = (program() for _ in range(RUNS))
    return first, sum(int(unequal(other, first)) for other in others)


@jax.jit
def unequal(a: Any, b: Any) -> jax.Array:
    """How many elements of two trees differ."""
    return sum(jnp.sum(one != other) for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def distance(got: jax.Array, right: jax.Array) -> dict[str, float]:
    """error: the largest difference over the largest value, infinite where something is not finite; largest: the same
    as it is; differ: the share of elements that are not equal."""
    return dict(zip(("error", "largest", "differ"), map(float, _distance(got, right)), strict=True))


@jax.jit
def _distance(got: jax.Array, right: jax.Array) -> tuple[jax.Array, ...]:
    got, right = got.astype(jnp.float32), right.astype(jnp.float32)
    off = jnp.abs(got - right)
    return products.relative_error(got, right), off.max(), (off != 0).mean()


@functools.partial(jax.jit, static_argnums=0)
def stacked(layers: int, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """So many layers, each with the channels of the one before it turned by one place; one layer is no stack."""
    turned = [jax.tree.map(functools.partial(jnp.roll, shift=i, axis=0), weights) for i in range(layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *turned) if layers > 1 else weights


def last(layers: int) -> jax.Array | None:
    return jnp.int32(layers - 1) if layers > 1 else None


def integers(m: int, n: int, k: int, layers: int = 1, settings: TileConfig | None = None) -> dict[str, Any]:
    """The kernel's sums of integers, all of them, beside XLA's in float32 at full precision, which are exact."""
    from pallas_kernels import triton

    target = current_target()
    settings = settings or choose_tiles(target, m, n, k, "int8")
    held = stacked(layers, {"packed": products.weights("packed", n, k)["packed"], "scale": jnp.ones(n)})
    x, _ = products.rounded("int8", products.tokens(m, k))
    x = jnp.pad(x, ((0, 0), (0, 4 * held["packed"].shape[-1] - k)))

    @jax.jit
    def sums(x: jax.Array, packed: jax.Array) -> jax.Array:
        codes = unpack_ternary(packed.reshape(layers, n, -1)[-1], x.shape[1])
        return products.exact_sums(x, codes)

    right = sums(x, held["packed"])
    how = {"settings": settings, "out_dtype": jnp.float32, "interpret": target.platform == "interpret"}
    program = jax.jit(lambda x, held, layer: triton.matmul(x, jnp.ones(m), bias=None, layer=layer, **held, **how))
    got, moved = runs(lambda: program(x, held, last(layers)), right)
    found = {"tile": tile(dataclasses.astuple(settings)), "moved": moved}
    return verdict(found | distance(got, right), {"differ": 0})


def epilogue(
    name: str, m: int, n: int, k: int, head: int, channels: tuple[int, int] | None = None, layers: int = 1
) -> dict[str, Any]:
    """A product with what it ends with, by the kernel and by XLA, which leaves it in float32."""
    first, end = channels or (0, n)
    x, then = (
        products.rounded("int8", products.tokens(m, k)),
        products.epilogue_operands(name, m, end - first, head),
    )
    held = stacked(layers, products.weights("packed", n, k))

    def product(implementation: str, dtype: Any) -> Any:
        how = {"implementation": implementation, "out_dtype": dtype, "channels": channels}
        program = jax.jit(
            lambda x, held, then, layer: fused.fused_matmul(*x, **held, epilogue=then, layer=layer, **how)
        )
        return functools.partial(program, x, held, then, last(layers))

    right = product("xla", jnp.float32)()
    got, moved = runs(product("triton", jnp.bfloat16), right)
    limits = {"norm_rotary": TURNED, "gelu_quantize": PARTED}.get(name, ROUNDED)
    return verdict(distance(got, right) | {"moved": moved}, limits)


def residual_kept(m: int, n: int, k: int) -> dict[str, Any]:
    """A residual that is used again behind the product that could have taken its place."""
    x, own = products.rounded("int8", products.tokens(m, k)), products.weights("packed", n, k)
    then = products.epilogue_operands("gated_residual", m, n, n)

    @functools.partial(jax.jit, static_argnums=0)
    def program(implementation: str, then: epilogues.GatedResidual) -> tuple[jax.Array, jax.Array]:
        y = fused.fused_matmul(*x, **own, epilogue=then, implementation=implementation)
        return y, then.residual + 1

    (right, kept), ((got, again), moved) = program("xla", then), runs(lambda: program("triton", then), then.residual)
    lost = {"lost": int(jnp.sum(again != kept))}
    return verdict(distance(got, right) | {"moved": moved} | lost, {"error": 2**-7, "lost": 0})


def rounding(function: Callable[..., Any], *operands: jax.Array) -> dict[str, Any]:
    """Rows that a kernel rounds to int8, and their scales, beside XLA's. function takes `implementation`."""
    by = {name: jax.jit(functools.partial(function, implementation=name)) for name in ("xla", "triton")}
    right, scales = by["xla"](*operands)
    (got, own), moved = runs(lambda: by["triton"](*operands), right)
    found = distance(got, right) | {"scale": distance(own, scales)["error"], "moved": moved}
    return verdict(found, PARTED | {"scale": 1e-5})


def floats(m: int, n: int, k: int, dtype: str) -> dict[str, Any]:
    """Floating activations by the kernel, beside float64 on the host."""
    x, own = products.tokens(m, k).astype(dtype), products.weights("packed", n, k)
    program = jax.jit(functools.partial(ternary_matmul, activations="bf16", implementation="triton"))
    got, moved = runs(lambda: program(x, **own), jnp.zeros((m, n)))
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in own.items() if name != "packed"}
    codes = unpack_ternary(np.asarray(own["packed"]), k).astype(np.float64)
    right = np.asarray(x, np.float64) @ codes.T * wide["scale"] + wide["bias"]
    error = np.abs(np.asarray(got, np.float64) - right).max() / np.abs(right).max()
    return verdict({"error": float(error), "moved": moved}, {"error": FLOATS[dtype]})


def cases(config: FluxConfig, tiny: bool) -> Iterator[tuple[str, Job]]:
    """Name and function of each, those first whose failure would say most; with `tiny` about one of each kind."""
    d, mlp, head = config.transformer.hidden_size, config.transformer.mlp_dim, config.transformer.head_dim
    run = products.model_products(config)
    if tiny:  # one of each epilogue
        run = list({product.epilogue: product for product in run}.values())
    for m in () if tiny else (4608, 512, 77, 28, 1):
        for n, k in ((d, d), (mlp, d), (d, d + mlp)):
            yield f"integers {m}x{n}x{k}", functools.partial(integers, m, n, k)
    for product in run:
        m, n, k, name = product[:4]
        yield f"{name} {m}x{n}x{k}", functools.partial(epilogue, name, m, n, k, head)
    m = run[0].m
    yield f"residual kept {m}x{d}x{d}", functools.partial(residual_kept, m, d, d)
    linear1 = (m, 3 * d + mlp, d, head)  # of which a product computes some channels, in one layer of a stack
    yield f"stack, channels {m}", functools.partial(epilogue, "norm_rotary", *linear1, (d, 2 * d), 3)
    for rows in () if tiny else (m, 512):
        yield f"gelu_quantize {rows}x{mlp}x{d}", functools.partial(epilogue, "gelu_quantize", rows, mlp, d, head)
    for rows, width in ((7, 96),) if tiny else ((4608, d), (512, d), (77, d), (7, 96)):
        x = functools.partial(products.tokens, rows, width)
        vectors = [products.tokens(1, width)[0], products.tokens(2, width)[1]]
        norm = fused.norm_modulate_quantize
        yield f"norm {rows}x{width}", lambda x=x, vectors=vectors, norm=norm: rounding(norm, x(), *vectors)
    for rows, widths in ((m, (d, mlp)), (m, (d,)), (7, (96, 33)))[2 if tiny else 0 :]:
        parts = [functools.partial(products.tokens, rows, width) for width in widths]
        yield (
            f"concatenate {rows}x{widths}",
            lambda parts=parts: rounding(fused.concatenate_quantize, *(part() for part in parts)),
        )
    edges = ((1, 48, 200), (7, 384, 128), (77, 33, 129), (150, 40, 384), (513, 200, 640))
    for m, n, k in edges[:1] if tiny else edges:
        yield f"integers {m}x{n}x{k}", functools.partial(integers, m, n, k)
        for dtype in list(FLOATS)[: 1 if tiny else None]:
            yield f"{dtype} {m}x{n}x{k}", functools.partial(floats, m, n, k, dtype)
    for name in ("gelu_quantize",) if tiny else EPILOGUES:
        yield f"{name} edge", functools.partial(epilogue, name, 33, 3 * head, 200, head)
    yield "integers, layer 2 of 3", functools.partial(integers, 33, 128, 256, 3)
    for tiling in () if tiny else TILINGS:
        yield f"integers {tiling}", functools.partial(integers, 4608, mlp, d, settings=TileConfig(*tiling))


def check(journal: Journal, named: Iterator[tuple[str, Job]], tiny: bool) -> None:
    """A row each, several at a time: compiling takes most of the time."""

    def one(case: tuple[str, Job]) -> None:
        name, job = case
        begun = time.monotonic()
        with device_for(tiny):  # a thread does not inherit it
            journal.attempt(
                {"case": name}, lambda: job() | {"seconds": round(time.monotonic() - begun, 2)}, LEAST_SECONDS
            )

    with ThreadPoolExecutor(2 if tiny else THREADS) as pool:
        list(pool.map(one, list(named)))


def main(argv: Sequence[str]) -> None:
    args = report.parser("correct", __doc__, tiny="small cases on any device, to try the program").parse_args(argv)
    report.has_gpu(args.tiny)
    journal = report.journal(args)
    check(journal, cases(nano() if args.tiny else dev(), args.tiny), args.tiny)
    columns = ["case", "error", "differ", "moved", "wrong", "failure", "skipped"]
    print(report.table(columns, [[row.get(column) for column in columns] for row in journal.rows]))
    report.finish("correct", {"tiny": args.tiny, "cases": journal.rows}, save=args.save)
    if bad := sum(map(is_problem, journal.rows)):
        raise UserError(f"{bad} of {len(journal.rows)} cases are wrong or failed", 1)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
