"""`python -m bench.distill_steps`: real steps of the blockwise phase on one block of FLUX.1-dev of each kind.

In: a device, a size, a number of points; weights, inputs and targets are random, of full size, and made there. Out, for
a double and a single block: seconds of a step (median, quartiles), compiling apart from them, the device's own counter
of peak memory beside the bytes that XLA planned, and the first and the last loss. Each kind has a process of its own,
whose peak is its own, and a time box; one that fails leaves the other's figures. What to expect without a GPU tells
`bench.distill`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from bench import draw, process, report, timing
from bench.distill import block_training, memory, parameter_count
from bench.memory import GIGABYTE, image_tokens
from flux_jax.cli.arguments import parse_size
from flux_jax.config import FluxConfig, dev, nano
from flux_jax.distill import training
from flux_jax.distill.options import Options
from flux_jax.errors import UserError
from flux_jax.runtime.memory import peak
from flux_jax.training import mesh as meshes

KINDS = ("double_blocks", "single_blocks")
LEAST_SECONDS = 10.0  # without which a kind is not begun
SAID = 20  # lines of what a kind said on stderr that are said again


def random(tree: Any, spread: float, seed: int) -> Any:
    """Normal numbers in the place of abstract arrays, on the device; logarithms of scales are about the width's."""

    def fill(path: tuple, x: Any, seed: int) -> jax.Array:
        mean = -4.0 if training.kind(path) == "scale" else 0.0
        return (mean + spread * draw.normal(seed, x.shape, jnp.float32)).astype(x.dtype)

    count = len(jax.tree.leaves(tree))
    seeds = jax.tree.unflatten(jax.tree.structure(tree), range(seed * count, (seed + 1) * count))
    return jax.jit(lambda: jax.tree_util.tree_map_with_path(fill, tree, seeds))()


def trial(kind: str, config: FluxConfig, options: Options, tokens: int, steps: int) -> dict[str, Any]:
    """Runs the steps here: {parameters, compile_seconds, seconds, quartiles, peak_bytes, losses}."""
    one = jax.make_mesh((1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    loss, plan, params, batch, rope = block_training(one, kind, config, options, tokens, options.block_batch)
    batch, rope = random(batch, 1.0, 1), random({"rope": rope}, 1.0, 2)["rope"]
    state = training.init_state(plan, one, random(params, 0.6, 0))
    start = time.perf_counter()
    program = training.update.lower(loss, plan, one, state, batch, rope, np.int32(0)).compile()
    compiled, seconds, losses = time.perf_counter() - start, [], []
    for step in range(steps + 1):  # the first is not counted
        start = time.perf_counter()
        state, numbers = jax.block_until_ready(program(state, batch, rope, np.int32(step)))
        seconds.append(time.perf_counter() - start)
        losses.append(float(numbers["loss"]))
    return {
        "block": kind.removesuffix("s"),
        "parameters": parameter_count(params),
        "points": options.block_batch,
        "compile_seconds": compiled,
        **timing.summary(seconds[1:]),
        "peak_bytes": peak(jax.local_devices()[0]),
        "planned_bytes": memory(program)["peak_bytes"],
        "losses": [losses[0], losses[-1]],
        **verdict(losses),
    }


def verdict(losses: Sequence[float]) -> dict[str, str]:
    """{"wrong": why} where steps on one batch do not learn it."""
    learned = np.isfinite(losses).all() and losses[-1] < losses[0]
    return {} if learned else {"wrong": f"the loss goes from {losses[0]:.4g} to {losses[-1]:.4g}"}


def main(argv: Sequence[str]) -> None:
    parser = report.parser("distill_steps", __doc__, tiny="FLUX-nano instead of FLUX.1-dev: to try this program")
    add = parser.add_argument
    add("--steps", type=int, default=50, help="measured steps of each kind of block (default: %(default)s)")
    add("--size", type=parse_size, metavar="WxH", help="pixels (default: the model's)")
    add("--block-batch", type=int, default=1, help="points of a step (default: %(default)s)")
    add("--kind-seconds", type=float, default=900.0, help="at most for each kind (default: %(default)s)")
    add("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.block_batch < 1:
        raise UserError("--steps and --block-batch must be at least 1.")
    if args.kind:
        config = nano() if args.tiny else dev()
        tokens = image_tokens(config, *(args.size or (config.sampling.width, config.sampling.height)))
        options = Options(block_steps=args.steps + 1, block_batch=args.block_batch)
        print(json.dumps(trial(args.kind, config, options, tokens, args.steps)))
        return
    report.leave_memory()
    report.has_gpu(args.tiny)
    journal, rows = report.journal(args), []
    for kind in KINDS:

        def job(kind: str = kind) -> dict[str, Any]:
            box = min(args.kind_seconds, journal.left())
            ended = process.run(["-m", "bench.distill_steps", *argv, "--kind", kind], seconds=box)
            report.say("\n  ".join([kind, *ended.err[-SAID:]]))
            return ended.result()

        rows.append(journal.attempt({"kind": kind}, job, LEAST_SECONDS))
    cells = []
    for row in (row for row in rows if "losses" in row):
        counted = row["peak_bytes"] and row["peak_bytes"] / GIGABYTE
        sizes = [row["points"], row["parameters"] / 1e6, row["seconds"], row["compile_seconds"]]
        cells.append([row["block"], *sizes, counted, row["planned_bytes"] / GIGABYTE, *row["losses"]])
    header = ["block", "points", "M weights", "s a step", "s to compile", "peak GB", "planned GB", "first loss", "last"]
    print(report.table(header, cells))
    report.finish("distill_steps", {"steps": args.steps, "blocks": rows}, save=args.save)
    bad = [(row["kind"], row.get("failure") or row.get("wrong")) for row in rows]
    if failures := "; ".join(f"{kind}: {why}" for kind, why in bad if why):
        raise UserError(failures, 1)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
