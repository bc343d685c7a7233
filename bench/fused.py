"""`python -m bench.fused`: what A8 is made of: products with their epilogues, what stands before them, attention.

In: a GPU (or, with --tiny, any device: FLUX-nano, to try the program). Out: seconds of each product of a step with what
it ends with, by the Triton kernel and by XLA, and its error; of the norm with modulation and rounding, and of the
rounding of what a block joins, with the bytes a second that they read and write; of a block's attention.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from bench import baseline, report, timing
from bench.implementations import fused_case
from bench.products import Product, tokens
from bench.tiles import wanted
from bench.timing import device_for
from flux_jax.config import FluxConfig, dev, nano
from pallas_kernels import epilogues, fused

IMPLEMENTATIONS = ("triton", "xla")


def product_case(product: Product, head: int, implementation: str) -> timing.Case:
    def multiply(x: Any, own: dict[str, jax.Array], epilogue: epilogues.Epilogue | None) -> jax.Array:
        return fused.fused_matmul(*x, **own, epilogue=epilogue, implementation=implementation)

    return fused_case(product, head, {"implementation": implementation}, multiply)


def rounding_case(name: str, m: int, widths: Sequence[int], implementation: str) -> timing.Case:
    """A kernel that rounds bf16 rows of these widths, joined, to int8: "norm_modulate_quantize" or
    "concatenate_quantize". The rows are what is copied, so that each call finds them in memory."""
    vectors = 2 if name == "norm_modulate_quantize" else 0

    def operands() -> tuple[Any, Any, None]:
        return tuple(tokens(vectors, widths[0])), [tokens(m, width) for width in widths], None

    def operation(given: Sequence[jax.Array], rows: Sequence[jax.Array], _: Any) -> Any:
        return getattr(fused, name)(*rows, *given, implementation=implementation)

    def figures(ran: timing.Ran) -> dict[str, float]:
        return {"gigabytes_per_second": 3e-9 * m * sum(widths) / ran.seconds}

    labels = {"kernel": name, "m": m, "k": sum(widths), "parts": len(widths), "implementation": implementation}
    return timing.Case(labels, operation, operands, figures)


def cases(config: FluxConfig, tiny: bool) -> list[timing.Case]:
    """The products with the most work first; with `tiny` one of each epilogue."""
    model, text = config.transformer, config.sampling.max_sequence_length
    d, hidden, image = model.hidden_size, model.mlp_dim, math.prod(config.default_grid)
    products = [product for product in wanted(config, "int8") if product.calls]
    if tiny:
        products = list({product.epilogue: product for product in products}.values())
    makers = [functools.partial(product_case, product, model.head_dim) for product in products]
    makers += [
        functools.partial(rounding_case, "norm_modulate_quantize", m, (d,)) for m in (image + text, text)[: 2 - tiny]
    ]
    joined = [(image + text, (d, hidden)), (image, (d,)), (image, (hidden,))]
    makers += [
        functools.partial(rounding_case, "concatenate_quantize", *each) for each in joined[: 1 if tiny else None]
    ]
    return [make(implementation) for make in makers for implementation in IMPLEMENTATIONS]


def main(argv: Sequence[str]) -> None:
    args = report.parser("fused", __doc__, tiny="FLUX-nano on any device, to try the program").parse_args(argv)
    journal, config = report.journal(args), nano() if args.tiny else dev()
    with device_for(args.tiny):
        rows = timing.run(cases(config, args.tiny), journal, tiny=args.tiny)
        rows += baseline.attention(config, journal, tiny=args.tiny)
    figures = ["tflops", "gigabytes_per_second", "error"]
    header = ["", "m", "n", "k", "implementation", "us", "quartiles", "TFLOP/s", "GB/s", "error"]
    print(report.table(header, (line(row, header[1:5], figures) for row in rows)), "\n")
    report.finish("fused", {"tiny": args.tiny, "wrong": timing.wrong(rows), "rows": rows}, save=args.save)
    timing.refuse_wrong(rows)


def line(row: dict[str, Any], labels: Sequence[str], figures: Sequence[str]) -> list[Any]:
    name = row.get("kernel") or row.get("part") or f"product, {row['epilogue']}"
    return [name, *map(row.get, labels), *timing.cells(row), *map(row.get, figures)]


if __name__ == "__main__":
    raise SystemExit(report.run(main))
