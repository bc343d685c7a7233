"""`python -m bench.kernels`: the ternary products of FLUX against bf16 through XLA, timed on the device and checked.

In: a GPU (or, with --tiny, any device: small products, to try the program). Out: for every (n, k) of FLUX's ternary
layers, and each number of rows m, the seconds of every implementation in `bench.products`, its rate, its share of what
this device was measured to reach at best, its speed-up over bf16, and its error against float64 in the same run. Each
sample loops on the device over more weights than a cache holds (`bench.timing`).
"""

import argparse
import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from bench import report, timing
from bench.products import IMPLEMENTATIONS, LIMITS, error, expected, kernel, operands, quantized, shapes
from flux_jax.config import dev, nano
from flux_jax.errors import UserError
from pallas_kernels import Target, compiling_for

FEW_ROWS = 16  # up to here the weights' bytes are the work, above it the arithmetic
SMALLEST_CALL = 4e-6  # seconds, to guess how often a loop has to go round


@contextlib.contextmanager
def device_for(tiny: bool) -> Iterator[None]:
    """The GPU; with `tiny` any device, on which the kernels are interpreted if it is not a GPU."""
    with contextlib.nullcontext() if report.has_gpu(tiny) else compiling_for(Target("interpret", "9.0")):
        yield


def measure(m: int, n: int, k: int, names: Sequence[str], samples: int, tiny: bool) -> list[dict[str, Any]]:
    """The rows of one shape: all programs are compiled first, several at a time, and then run one by one."""
    x, *sets = operands(m, n, k)
    weights = dict(zip(("dense", "packed"), sets, strict=True))
    plans = []
    for name in names:
        own, function = weights[IMPLEMENTATIONS[name].weights], IMPLEMENTATIONS[name].function
        inputs = quantized(x) if function is kernel else x
        copies = timing.copies(own, 1 if tiny else None)
        guess = max(2 * m * n * k / 5e14, nbytes(own) / 2e12, SMALLEST_CALL)
        rounds = 1 if tiny else timing.rounds_for(guess, len(copies))
        plans.append((name, inputs, copies, rounds))
    lowered = [timing.loop(IMPLEMENTATIONS[name].function, rounds).lower(i, c) for name, i, c, rounds in plans]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        compiled = list(pool.map(lambda program: program.compile(), lowered))
    rows = []
    for (name, inputs, copies, rounds), program in zip(plans, compiled, strict=True):
        seconds = timing.samples(program, inputs, copies, rounds, samples)
        outputs = program(inputs, copies)
        _, activations, _ = IMPLEMENTATIONS[name]
        right = expected(activations, x, copies[0])
        wrong = max(error(y, right) for y in outputs)
        row = {"m": m, "n": n, "k": k, "implementation": name, **timing.summary(seconds), "error": wrong}
        rows.append(row | {"correct": wrong <= LIMITS[activations]})
        del outputs
    return rows


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def peaks(tiny: bool, samples: int) -> dict[str, float]:
    """The best that this device was seen to do: bf16 and int8 products of XLA (operations a second), copying (bytes a
    second, read and written)."""
    edge, words = (256, 2**12) if tiny else (8192, 2**28)
    key = jax.random.key(0)
    normal = jax.random.normal(key, (edge, edge), jnp.bfloat16)
    whole = jax.random.randint(key, (edge, edge), -127, 128, jnp.int8)

    def product(a, b):
        kind = jnp.bfloat16 if a.dtype == jnp.bfloat16 else jnp.int32
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=kind)

    cases = {
        "bf16_operations": (product, normal, normal, 2 * edge**3, 5e14),
        "int8_operations": (product, whole, whole, 2 * edge**3, 5e14),
        "memory_bytes": (lambda _, w: w + 1, jnp.zeros(()), jnp.zeros(words), 8 * words, 2e12),
    }
    best = {}
    for name, (operation, x, w, work, guess) in cases.items():
        rounds = 1 if tiny else timing.rounds_for(work / guess, 2)
        program = timing.loop(operation, rounds).lower(x, [w, w]).compile()
        best[name] = work / min(timing.samples(program, x, [w, w], rounds, samples))
    return best


def rate(row: dict[str, Any], best: dict[str, float]) -> dict[str, float]:
    """Operations a second, bytes of weights a second, and the share of the best of the one that limits."""
    operations = 2 * row["m"] * row["n"] * row["k"] / row["seconds"]
    implementation = IMPLEMENTATIONS[row["implementation"]]
    bits = 16 if implementation.weights == "dense" else 2
    read = row["n"] * row["k"] * bits / 8 / row["seconds"]
    peak = best[f"{implementation.activations}_operations"]
    share = read / best["memory_bytes"] if row["m"] <= FEW_ROWS else operations / peak
    return {"tflops": operations / 1e12, "weight_gigabytes_per_second": read / 1e9, "share_of_peak": share}


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row its speed-up over bf16; returns, for each implementation and m, the geometric mean and least."""
    plain = {(row["m"], row["n"], row["k"]): row["seconds"] for row in rows if row["implementation"] == "bf16"}
    for row in rows:
        seconds = plain.get((row["m"], row["n"], row["k"]))
        row["speedup"] = seconds and seconds / row["seconds"]
    found = []
    for m, name in dict.fromkeys((row["m"], row["implementation"]) for row in rows):
        speedups = [r["speedup"] for r in rows if (r["m"], r["implementation"]) == (m, name) and r["speedup"]]
        if speedups:
            mean = statistics.geometric_mean(speedups)
            found.append({"m": m, "implementation": name, "geometric_mean": mean, "least": min(speedups)})
    return found


def main(argv: Sequence[str]) -> None:
    args = options(argv)
    names = args.implementations
    config = nano() if args.tiny else dev()
    every = shapes(config)
    wanted = {shape: layers for shape, layers in every.items() if args.shapes is None or shape in args.shapes}
    if not wanted:
        raise UserError(f"--shapes must name some of {', '.join(f'{n}x{k}' for n, k in every)}.")
    rows = []
    with device_for(args.tiny):
        best = peaks(args.tiny, args.samples)
        for m in args.m or ([33, 1] if args.tiny else [4608, 1]):
            for (n, k), layers in wanted.items():
                report.say(f"{m} x {n} x {k}: {', '.join(layers)}")
                rows += [row | rate(row, best) for row in measure(m, n, k, names, args.samples, args.tiny)]
    summary = compare(rows)
    print("best of this device: " + ", ".join(f"{name} {value / 1e12:.4g} T/s" for name, value in best.items()) + "\n")
    header = ["m", "n", "k", "implementation", "us", "quartiles", "TFLOP/s", "GB/s", "of best", "x bf16", "error"]
    print(report.table(header, map(line, rows)), "\n")
    columns = ["m", "implementation", "geometric_mean", "least"]
    print(
        report.table(
            ["m", "implementation", "x bf16, geometric mean", "least"], [[s[c] for c in columns] for s in summary]
        )
    )
    wrong = sum(not row["correct"] for row in rows)
    figures = {"tiny": args.tiny, "best": best, "summary": summary, "wrong": wrong, "products": rows}
    report.finish("kernels", figures, save=args.save)
    if wrong:
        raise UserError(f"{wrong} results were wrong: see the column error", 1)


def line(row: dict[str, Any]) -> list[Any]:
    low, high = (f"{q * 1e6:.1f}" for q in row["quartiles"])
    figures = [row["tflops"], row["weight_gigabytes_per_second"], row["share_of_peak"], row["speedup"], row["error"]]
    seconds = [f"{row['seconds'] * 1e6:.1f}", f"{low}..{high}"]
    return [row["m"], row["n"], row["k"], row["implementation"], *seconds, *figures]


def shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = report.parser("kernels", __doc__)
    add = parser.add_argument
    add("--m", nargs="+", type=int, help="numbers of rows (default: 4608 and 1)")
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="default: all of FLUX's")
    add("--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    add("--samples", type=int, default=9)
    add("--tiny", action="store_true", help="small products on any device, to try the program")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
