"""`python -m bench.mosaic`: whether a backend in Pallas's Mosaic GPU would be quicker than the one in Triton.

In: an H100 or H200 (or, with --tiny, any device: a small product in Mosaic's interpreter, to try the program). Out: for
the products with the most work, seconds and error of bf16, of the best of the Triton kernel's tiles, and of
`bench.mosaic_matmul` in some variants; last, by how many percent the best of those is ahead of the best tile, which is
flattered: it leaves out scales and bias. Above 10 % it is worth building.
"""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench import report, timing
from bench.implementations import fused_case, kernel, plain_case, rate
from bench.products import LIMITS, Product, expected, judged, rounded, tokens, weights
from bench.tiles import candidates, own_settings, tile
from bench.timing import device_for
from flux_jax.config import dev
from pallas_kernels import current_target

HEAD = dev().transformer.head_dim
SIZES, TINY_SIZES = ((4608, 12288, 3072), (4608, 3072, 15360), (4608, 3072, 3072)), ((128, 256, 256),)
TILES = 4  # of Triton: the one that the product has, and the first ones of `bench.tiles`
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"tile_n": 64, "tile_m": 256}, {"slots": 6}, {"warpgroup_semantics": True})
TINY_VARIANTS: tuple[dict[str, Any], ...] = ({"slots": 2, "blocks": 1},)
WORTH_PERCENT = 10.0


def mosaic_case(m: int, n: int, k: int, how: dict[str, Any]) -> timing.Case:
    interpret = current_target().platform == "interpret"

    def operands() -> tuple[Any, Any, None]:
        return rounded("int8", tokens(m, k))[0], {"packed": weights("packed", n, k)["packed"]}, None

    def operation(x: jax.Array, own: dict[str, jax.Array], _: Any) -> jax.Array:
        from bench.mosaic_matmul import matmul  # which a JAX without Mosaic GPU cannot import: then a row says so

        return matmul(x, **own, interpret=interpret, **how)

    def figures(ran: timing.Ran) -> dict[str, Any]:
        x, own, _ = ran.operands
        plain = {"scale": jnp.full(n, 64.0), "bias": jnp.zeros(n)}
        right = expected("int8", (x, jnp.ones(m)), own | plain)
        return rate(m, n, k, ran.seconds) | judged(ran.out.T, right, LIMITS["int8"])

    labels = {"m": m, "n": n, "k": k, "implementation": "mosaic"}
    variant = ", ".join(f"{name} {value}" for name, value in how.items()) or "as it is"
    return timing.Case({**labels, "variant": variant}, operation, operands, figures, timing.copies_for(m))


def lacking() -> str | None:
    """Why Mosaic's kernel cannot be tried on this device; None where it can."""
    if current_target().platform == "gpu":
        return None
    from jax.experimental.pallas import mosaic_gpu

    has = hasattr(mosaic_gpu, "InterpretGPUParams")
    return None if has else f"JAX {jax.__version__} has no interpreter for Mosaic GPU"


def cases(m: int, n: int, k: int, tiny: bool) -> list[timing.Case]:
    product = Product(m, n, k, "none", 0, ())
    tiles = [own_settings(product, "int8", HEAD), *candidates(product, "int8", HEAD)][: 1 if tiny else TILES]
    triton = [
        fused_case(
            product,
            HEAD,
            {"implementation": "triton", "variant": tile(dataclasses.astuple(settings))},
            functools.partial(kernel, settings=settings),
        )
        for settings in tiles
    ]
    variants = TINY_VARIANTS if tiny else VARIANTS
    mosaic = [] if lacking() else [mosaic_case(m, n, k, how) for how in variants]
    return [plain_case(m, n, k, "bf16"), *triton, *mosaic]


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By how many percent the best of Mosaic is quicker than the best of Triton: for each size, and their mean;
    {"failure": why} where there is none of either that is right."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.get("correct"):
            key = "x".join(str(row[axis]) for axis in "mnk"), row["implementation"]
            best[key] = min(row["seconds"], best.get(key, float("inf")))
    ahead = {
        size: best[size, "triton"] / best[size, "mosaic"]
        for size, name in best
        if name == "mosaic" and (size, "triton") in best
    }
    if not ahead:
        return {"failure": "no size has a right result of both, Mosaic and Triton"}
    percent = {size: 100 * (times - 1) for size, times in ahead.items()}
    mean = 100 * (statistics.geometric_mean(ahead.values()) - 1)
    return {"ahead_percent": mean, "worth_building": mean > WORTH_PERCENT, "sizes": len(ahead), **percent}


def main(argv: Sequence[str]) -> None:
    tiny = "small products on any device, to try the program"
    args = report.parser("mosaic", __doc__, tiny=tiny).parse_args(argv)
    journal = report.journal(args)
    with device_for(args.tiny):
        rows = []
        for size in TINY_SIZES if args.tiny else SIZES:
            rows += timing.run(cases(*size, args.tiny), journal, tiny=args.tiny)
        why = lacking()
    found = journal.row(**({"skipped": why} if why else verdict(rows)))
    header = ["m", "n", "k", "implementation", "variant", "us", "quartiles", "TFLOP/s", "error"]
    table = ([*map(row.get, header[:5]), *timing.cells(row), row.get("tflops"), row.get("error")] for row in rows)
    print(report.table(header, table), "\n")
    outcome = found.get("failure") or found.get("skipped")
    print(outcome or f"the best of Mosaic is {found['ahead_percent']:.1f} % quicker than the best of Triton", "\n")
    report.finish("mosaic", {"tiny": args.tiny, "verdict": found, "rows": rows}, save=args.save)
    timing.refuse_wrong(rows)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
