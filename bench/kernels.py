"""`python -m bench.kernels`: the ternary products of FLUX against bf16 through XLA, timed on the device and checked.

In: a GPU (or, with --tiny, any device: small products, to try the program). Out: what this device reaches at best; for
numbers of tokens m and the layers that run with so many, the seconds of each implementation, its rate, its share of
that best, its speed-up over bf16, and its error in the same run; behind each number of tokens, each implementation's
mean speed-up. A program that fails costs only its own row. Each sample loops on the device (`bench.timing`).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench import draw, report, timing
from bench.implementations import IMPLEMENTATIONS, plain_case
from bench.journal import Journal
from bench.products import shapes
from bench.timing import device_for
from flux_jax.config import dev, nano
from flux_jax.errors import UserError
from pallas_kernels.dispatch import FLOATING_ROWS
from pallas_kernels.tiling import GEMV_ROWS

# Tokens of a picture with its text, one step's modulation, the text, all steps' modulation; what matters most is first.
ROWS = (4608, 1, 512, 28)
# With many tokens floating activations go to XLA, with few to the kernel
# (`pallas_kernels.dispatch.choose_implementation`).
MANY = ("bf16", "A8 kernel, int8 given", "A8 kernel", "A16 scratch", "A8 scratch")
FEW = ("bf16", "A16 kernel", "A8 kernel", "A8 kernel, int8 given")
MANY_TOO = (12288, 3072, "A16 kernel")  # whether it is right that the kernel does not take these
TINY_ROWS = (33, 1)


def layers_of(m: int, names: Sequence[str]) -> bool:
    """Whether one of these layers is to be measured with so many tokens: with one, every layer, for that is what their
    bytes cost; with those of all steps, the modulation; with those of a text, its own layers; with more, all others."""
    if m == 1:
        return True
    modulation = [name for name in names if name.endswith(".mod")]
    if m < 64:
        return bool(modulation)
    others = [name for name in names if name not in modulation]
    return any(".txt." in name for name in others) if m <= FLOATING_ROWS else bool(others)


def groups(args: argparse.Namespace) -> list[tuple[int, list[tuple[int, int, str]]]]:
    """m, and (n, k, implementation) of what is compared there, the largest shapes first. UserError: no such shape."""
    every = shapes(nano() if args.tiny else dev())
    if unknown := [shape for shape in args.shapes or () if shape not in every]:
        known = ", ".join(f"{n}x{k}" for n, k in every)
        raise UserError(f"--shapes must name some of {known}, not {', '.join(f'{n}x{k}' for n, k in unknown)}.")
    found = []
    for m in args.m or (TINY_ROWS if args.tiny else ROWS):
        wanted = args.shapes or [shape for shape, names in every.items() if args.tiny or layers_of(m, names)]
        wanted = sorted(wanted, key=lambda shape: -shape[0] * shape[1])
        wanted = wanted[-1:] if args.tiny and not args.shapes else wanted
        many = m > (GEMV_ROWS if args.tiny else FLOATING_ROWS)
        names = args.implementations or (MANY if many else FEW)
        products = [(*shape, name) for shape in wanted for name in names]
        if many and MANY_TOO[:2] in wanted and not args.implementations:
            products.append(MANY_TOO)
        found.append((m, products))
    return found


def ceilings(tiny: bool) -> list[timing.Case]:
    """What a device can be seen to do at best: products of XLA, and copying."""
    edge, words = (256, 2**12) if tiny else (8192, 2**28)

    def product(name: str, sums: Any, made: Callable[[int], jax.Array]) -> timing.Case:
        def operands() -> tuple[Any, Any, None]:
            return made(0), made(1), None

        def operation(a: jax.Array, b: jax.Array, _: Any) -> jax.Array:
            return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=sums)

        def figures(ran: timing.Ran) -> dict[str, float]:
            return {"operations": 2 * edge**3 / ran.seconds}

        return timing.Case({"ceiling": name}, operation, operands, figures, 2)

    def floats(seed: int) -> jax.Array:
        return draw.normal(seed, (edge, edge))

    def integers(seed: int) -> jax.Array:
        return draw.integers(seed, (edge, edge), -127, 127)

    copy = timing.Case(
        {"ceiling": "copy"},
        lambda _, words, __: words + 1,
        lambda: (None, jnp.zeros((words // 1024, 1024)), None),
        lambda ran: {"bytes": 8 * words / ran.seconds},
        2,
    )
    return [copy, product("bf16", jnp.bfloat16, floats), product("int8", jnp.int32, integers)]


def summarise(rows: Sequence[dict[str, Any]], journal: Journal) -> list[dict[str, Any]]:
    """Adds to each row of a product its rates and shares of the ceilings, and its speed-up over bf16; returns, and
    writes, a row for each implementation and m: the geometric mean of the speed-up, and the least."""
    best = {row["ceiling"]: row.get("bytes", row.get("operations")) for row in rows if "ceiling" in row}
    timed = [row for row in rows if "implementation" in row and "seconds" in row]
    plain = {(row["m"], row["n"], row["k"]): row["seconds"] for row in timed if row["implementation"] == "bf16"}
    for row in timed:
        weights, activations, _ = IMPLEMENTATIONS[row["implementation"]]
        read = row["n"] * row["k"] * (16 if weights == "dense" else 2) / 8 / row["seconds"]
        few = row["m"] <= GEMV_ROWS  # where the weights' bytes are the work
        peak, reached = best.get("copy" if few else activations), read if few else 1e12 * row["tflops"]
        seconds = plain.get((row["m"], row["n"], row["k"]))
        row["weight_gigabytes_per_second"] = read / 1e9
        row["share_of_peak"] = peak and reached / peak
        row["speedup"] = seconds and seconds / row["seconds"]
    found = []
    for m, name in dict.fromkeys((row["m"], row["implementation"]) for row in timed):
        speedups = [r["speedup"] for r in timed if (r["m"], r["implementation"]) == (m, name) and r["speedup"]]
        if speedups:
            mean = statistics.geometric_mean(speedups)
            labels = {"m": m, "over_bf16": name, "shapes": len(speedups)}
            found.append(journal.row(**labels, geometric_mean=mean, least=min(speedups)))
    return found


def main(argv: Sequence[str]) -> None:
    args = options(argv)
    journal, plan = report.journal(args), groups(args)
    with device_for(args.tiny):
        how = {"tiny": args.tiny, "samples": args.samples}
        rows, best, means = [], [], []
        for m, products in plan:
            report.say(f"{m} tokens: {len(products)} products")
            found = timing.run([plain_case(m, *product) for product in products], journal, **how)
            if not best and any(name == "bf16" for *_, name in products):
                best = timing.run(ceilings(args.tiny), journal, **how)
            means += summarise([*best, *found], journal)
            rows += found
    print(report.table(["best of this device", "T/s"], map(ceiling, best)), "\n")
    header = ["m", "n", "k", "implementation", "us", "quartiles", "TFLOP/s", "GB/s", "of best", "x bf16", "error"]
    print(report.table(header, map(line, rows)), "\n")
    print(report.table(["m", "implementation", "shapes", "x bf16, mean", "least"], [list(s.values()) for s in means]))
    figures = {"tiny": args.tiny, "best": best, "summary": means, "wrong": timing.wrong(rows), "products": rows}
    report.finish("kernels", figures, save=args.save)
    timing.refuse_wrong(rows)


def ceiling(row: dict[str, Any]) -> list[Any]:
    figure = row.get("bytes", row.get("operations"))
    return [row["ceiling"], timing.missing(row) if figure is None else figure / 1e12]


def line(row: dict[str, Any]) -> list[Any]:
    labels = [row["m"], row["n"], row["k"], row["implementation"]]
    figures = ["tflops", "weight_gigabytes_per_second", "share_of_peak", "speedup", "error"]
    return [*labels, *timing.cells(row), *map(row.get, figures)]


def shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = report.parser("kernels", __doc__, tiny="small products on any device, to try the program")
    add = parser.add_argument
    add("--m", nargs="+", type=int, help=f"numbers of tokens (default: {', '.join(map(str, ROWS))})")
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="default: those of the layers that run with so many")
    add("--implementations", nargs="+", choices=list(IMPLEMENTATIONS), help="default: those that suit so many")
    add("--samples", type=int, default=timing.SAMPLES)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
