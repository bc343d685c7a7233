"""`python -m bench.baseline`: the least that a denoising step of FLUX in bf16 takes on this device, part by part.

In: a GPU (or, with --tiny, any device: FLUX-nano, to try the program). Out: for every matrix product of the blocks the
seconds that XLA's library takes for it in bf16, with its bias, and its GELU where nothing else follows, times how often
a step runs it; the same of attention, by cuDNN, or by XLA where that fails; and their sum in milliseconds. Norms,
modulation, rotary embedding, gates and residuals are not in it, nor is what `bench.denoise`'s loop spends on copying
each layer's weights out of their stack: a bound from below on bf16, against which a speed-up is fair.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

from bench import draw, report, timing
from bench.implementations import dense, rate
from bench.journal import Journal
from bench.products import LIMITS, Layer, expected, judged, layers, tokens, weights
from bench.timing import device_for
from flux_jax.config import FluxConfig, dev, nano
from pallas_kernels import current_target, epilogues

IN_IT = "matrix products of the blocks with bias, GELU of the double blocks, attention"
NOT_IN_IT = "norms, modulation, rotary embedding, gates, residuals, GELU of the single blocks, copies of weights"


def product_case(layer: Layer) -> timing.Case:
    """A whole layer in bf16."""
    gelu = layer.parts == ((layer.n, "gelu"),)

    def operands() -> tuple[Any, Any, None]:
        return tokens(layer.m, layer.k), weights("dense", layer.n, layer.k), None

    def operation(x: jax.Array, own: dict[str, jax.Array], _: Any) -> jax.Array:
        y = dense(x, own)
        return jax.nn.gelu(y, approximate=True) if gelu else y

    def figures(ran: timing.Ran) -> dict[str, Any]:
        right = expected("bf16", *ran.operands[:2], epilogues.Gelu() if gelu else None)
        return rate(layer.m, layer.n, layer.k, ran.seconds) | judged(ran.out, right, LIMITS["bf16"])

    labels = {"part": layer.name, "m": layer.m, "n": layer.n, "k": layer.k, "gelu": gelu, "calls": layer.calls}
    return timing.Case(labels, operation, operands, figures, timing.copies_for(layer.m))


def attention_case(config: FluxConfig, implementation: str) -> timing.Case:
    """Attention of a block, over the text and a picture of the default size."""
    model = config.transformer
    t = math.prod(config.default_grid) + config.sampling.max_sequence_length
    shape = (1, t, model.num_heads, model.head_dim)

    def operands() -> tuple[Any, Any, None]:
        q, k, v = (draw.normal(seed, shape) for seed in range(3))
        return q, (k, v), None

    def operation(q: jax.Array, own: tuple[jax.Array, jax.Array], _: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # JAX's own code promotes inside, also where ours may not
            return jax.nn.dot_product_attention(q, *own, implementation=implementation)

    def figures(ran: timing.Ran) -> dict[str, float]:
        return {"tflops": 4e-12 * t**2 * model.hidden_size / ran.seconds}

    calls = model.num_double_blocks + model.num_single_blocks
    labels = {"part": "attention", "implementation": implementation, "tokens": t, "calls": calls}
    return timing.Case(labels, operation, operands, figures, timing.LEAST_COPIES)


def attention(config: FluxConfig, journal: Journal, *, tiny: bool) -> list[dict[str, Any]]:
    """By cuDNN on a GPU, and elsewhere, or where that fails, by XLA."""
    rows: list[dict[str, Any]] = []
    for implementation in ("cudnn", "xla") if current_target().platform == "gpu" else ("xla",):
        rows += timing.run([attention_case(config, implementation)], journal, tiny=tiny)
        if "seconds" in rows[-1]:
            break
    return rows


def total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds a step of all parts, each taken once; {"failure": why} where one has no time."""
    spent: dict[str, float | None] = {}
    for row in rows:  # of a part that was tried again, the last row counts
        spent[row["part"]] = row["calls"] * row["seconds"] if "seconds" in row else None
    if missing := [part for part, seconds in spent.items() if seconds is None]:
        return {"failure": f"no sum without {', '.join(missing)}"}
    each = {part: 1e3 * seconds for part, seconds in spent.items() if seconds is not None}
    return {"step_ms": sum(each.values()), "part_ms": each, "in_it": IN_IT, "not_in_it": NOT_IN_IT}


def main(argv: Sequence[str]) -> None:
    args = report.parser("baseline", __doc__, tiny="FLUX-nano on any device, to try the program").parse_args(argv)
    journal, config = report.journal(args), nano() if args.tiny else dev()
    with device_for(args.tiny):
        ordered = sorted(layers(config), key=lambda layer: -layer.calls * layer.m * layer.n * layer.k)
        rows = timing.run(list(map(product_case, ordered)), journal, tiny=args.tiny)
        rows += attention(config, journal, tiny=args.tiny)
    found = journal.row(**total(rows))
    columns = ["part", "implementation", "m", "n", "k", "calls"]
    header = [*columns, "us", "quartiles", "TFLOP/s", "ms a step"]
    print(report.table(header, (line(row, columns) for row in rows)), "\n")
    print(f"bf16, at least: {found['step_ms']:.2f} ms a step" if "step_ms" in found else found["failure"])
    print(f"in it: {IN_IT}; not in it: {NOT_IN_IT}\n")
    report.finish("baseline", {"tiny": args.tiny, "total": found, "parts": rows}, save=args.save)
    timing.refuse_wrong(rows)


def line(row: dict[str, Any], columns: Sequence[str]) -> list[Any]:
    step = 1e3 * row["calls"] * row["seconds"] if "seconds" in row else None
    return [*map(row.get, columns), *timing.cells(row), row.get("tflops"), step]


if __name__ == "__main__":
    raise SystemExit(report.run(main))
