"""`python -m bench.distill`: what the distillation of FLUX.1-dev takes, on GPUs that are not there.

In: names of GPUs, a size, batches. Out: for each GPU the peak bytes of a blockwise step of a block of each kind as XLA
compiled it ahead of time, the same of an end-to-end step sharded over eight of the last GPU, and the GPU hours of a
whole run with `--large`: counted floating-point operations over a stated rate, no measured time. Needs the extra `aot`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench import report
from bench.memory import GIGABYTE, image_tokens
from flux_jax.cli.arguments import parse_size
from flux_jax.config import FluxConfig, dev, nano
from flux_jax.distill import student, training
from flux_jax.distill.blockwise import BlockLoss
from flux_jax.distill.end_to_end import VelocityLoss, rollout_starts
from flux_jax.distill.options import LARGE, Options
from flux_jax.models.params import abstract_component, leaf_table
from flux_jax.models.quantize import is_ternary
from flux_jax.runtime import aot
from flux_jax.training import mesh as meshes


def abstract(shape: Sequence[int], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def compiled_step(
    devices: jax.sharding.Mesh, loss: Any, plan: training.FitConfig, params: Any, batch: dict, constants: Any
) -> Any:
    """`training.update` compiled for those devices; params abstract, batch and constants with shardings."""
    state = jax.eval_shape(lambda p: training.init_state(plan, devices, p), params)
    state = jax.tree.map(lambda x: abstract(x.shape, x.dtype, meshes.parameter(devices, x.shape)), state)
    step = jax.jit(lambda s, b, c, i: training.update(loss, plan, devices, s, b, c, i), donate_argnums=0)
    return aot.compile_for(devices, step, state, batch, constants, abstract((), jnp.int32, meshes.whole(devices)))


def memory(compiled: Any) -> dict[str, int]:
    """Bytes on one device: arguments, what the program allocates besides, their sum (outputs reuse the arguments)."""
    found = compiled.memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    sizes = {"argument_bytes": found.argument_size_in_bytes, "temporary_bytes": found.temp_size_in_bytes + fresh}
    return sizes | {"peak_bytes": sum(sizes.values())}


def block_training(
    devices: jax.sharding.Mesh, kind: str, config: FluxConfig, options: Options, tokens: int, batch: int
) -> tuple[BlockLoss, training.FitConfig, Any, dict[str, Any], jax.ShapeDtypeStruct]:
    """(loss, plan, parameters, a batch, rope) of phase `blockwise` for one block; the last three are abstract.

    kind: "double_blocks" or "single_blocks"; tokens: of the image; batch: points.
    """
    stacked = getattr(abstract_component("transformer", config), kind)
    rows, text, width = meshes.by_row(devices), config.sampling.max_sequence_length, config.transformer.hidden_size

    def one() -> nnx.Module:
        block = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), stacked)
        return student.student_of(block, f"{kind}.", options, rows=rows)

    graph, state = nnx.split(nnx.eval_shape(one))
    states, vec = (abstract((batch, *size), jnp.bfloat16, rows) for size in ((text + tokens, width), (width,)))
    inputs = dict.fromkeys(("student", "teacher", "target"), states) | {"vec": vec}
    rope = abstract((2, text + tokens, config.transformer.head_dim // 2), jnp.float32, meshes.whole(devices))
    plan = training.FitConfig.of(
        options, steps=options.block_steps, learning_rate=options.block_learning_rate, accumulate=1
    )
    loss = BlockLoss(graph, text, image_only=False, dtype=jnp.dtype(jnp.bfloat16))
    return loss, plan, nnx.to_pure_dict(state), inputs, rope


def parameter_count(params: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def block_step(gpu: str, kind: str, config: FluxConfig, options: Options, tokens: int, batch: int) -> dict[str, Any]:
    """The figures of one step of phase `blockwise` on one GPU."""
    devices = aot.mesh(gpu, (1, 1), meshes.AXES)
    loss, plan, params, inputs, rope = block_training(devices, kind, config, options, tokens, batch)
    compiled = compiled_step(devices, loss, plan, params, inputs, rope)
    about = {"gpu": gpu, "devices": 1, "program": f"blockwise, {kind[:-1].replace('_', ' ')}", "batch": batch}
    sizes = {"parameters": parameter_count(params), "device_bytes": aot.target(gpu).memory_bytes}
    return about | sizes | memory(compiled)


def whole_step(gpu: str, config: FluxConfig, options: Options, tokens: int, count: int, batch: int) -> dict[str, Any]:
    """The figures of one step of phase `end_to_end`, parameters cut over `count` GPUs, `batch` points in all."""
    devices, text = aot.mesh(gpu, (1, count), meshes.AXES), config.sampling.max_sequence_length
    change = functools.partial(student.student_of, prefix="", options=options, rows=meshes.by_row(devices))
    module = abstract_component("transformer", config, change=change)
    module.rematerialise = True
    graph, state = nnx.split(module)
    shape, rows, whole = config.transformer, meshes.by_row(devices), meshes.whole(devices)
    points = {
        "x": (batch, tokens, shape.in_channels),
        "velocity": (batch, tokens, shape.in_channels),
        "text": (batch, text, shape.text_dim),
        "pooled": (batch, shape.pooled_dim),
        "t": (batch,),
    }
    inputs = {name: abstract(size, jnp.float32, rows) for name, size in points.items()}
    sizes = {"rope": (2, text + tokens, shape.head_dim // 2), "guidance": ()}
    constants = {name: abstract(size, jnp.float32, whole) for name, size in sizes.items()}
    plan = training.FitConfig.of(options, steps=options.learning_steps)
    params = nnx.to_pure_dict(state)
    compiled = compiled_step(devices, VelocityLoss(graph, jnp.dtype(jnp.bfloat16)), plan, params, inputs, constants)
    about = {"gpu": gpu, "devices": count, "program": "end to end", "batch": batch}
    sizes = {"parameters": parameter_count(params), "device_bytes": aot.target(gpu).memory_bytes}
    return about | sizes | memory(compiled)


def forward_flops(config: FluxConfig, tokens: int) -> float:
    """Of the whole transformer at one point: two for each weight and token that it meets, four n^2 d for attention."""
    text, shape = config.sampling.max_sequence_length, config.transformer
    total = 0.0
    for name, size in leaf_table(abstract_component("transformer", config)).items():
        path = name.removesuffix(".weight")
        if name == path or not is_ternary(path):
            continue
        meets = (
            1 if path.endswith(".mod") else text if ".txt." in path else tokens if ".img." in path else text + tokens
        )
        total += 2 * size[0] * size[1] * meets
    layers = shape.num_double_blocks + shape.num_single_blocks
    return total + 4 * layers * (text + tokens) ** 2 * shape.hidden_size


def hours(config: FluxConfig, options: Options, tokens: int, rate: float) -> list[dict[str, Any]]:
    """The work of a run by phase. Training takes three forwards (the gradient is two), recomputed blocks a fourth."""
    forward, steps = forward_flops(config, tokens), options.steps or config.sampling.num_inference_steps
    passes = {
        "trajectories": (options.trajectories + options.held_out) * steps,
        "held-out losses": 3 * options.held_out * steps,
        "blockwise: states": 2 * options.block_points,
        "blockwise: training": 3 * options.block_steps * options.block_batch,
        "student's own trajectories": 2 * len(rollout_starts(options)) * options.own_trajectories * steps,
        "end to end": 4 * options.end_to_end_steps * options.batch,
    }
    rows = [{"phase": phase, "forwards": count, "flop": count * forward} for phase, count in passes.items()]
    rows.append({"phase": "all", "forwards": sum(passes.values()), "flop": sum(row["flop"] for row in rows)})
    return [row | {"gpu_hours": row["flop"] / rate / 3600} for row in rows]


def main(argv: Sequence[str]) -> None:
    parser = report.parser("distill", __doc__, tiny="FLUX-nano instead of FLUX.1-dev: to try this program")
    add = parser.add_argument
    add("--gpus", nargs="+", default=["rtx4090", "h100"], metavar="GPU", help="(default: rtx4090 h100)")
    add("--size", type=parse_size, metavar="WxH", help="pixels (default: the model's)")
    add("--block-batch", type=int, default=1, help="points of a blockwise step (default: %(default)s)")
    add("--shards", type=int, default=8, help="GPUs of an end-to-end step (default: %(default)s)")
    add(
        "--tflops",
        type=float,
        default=400.0,
        help="rate assumed of one GPU (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    config = nano() if args.tiny else dev()
    width, height = args.size or (config.sampling.width, config.sampling.height)
    tokens = image_tokens(config, width, height)
    options = Options(**LARGE)
    rows = []
    for gpu in args.gpus:
        for kind in ("double_blocks", "single_blocks"):
            report.say(f"{gpu}: blockwise, {kind}")
            rows.append(block_step(gpu, kind, config, options, tokens, args.block_batch))
    large = args.gpus[-1]
    report.say(f"{args.shards} x {large}: end to end")
    rows.append(whole_step(large, config, options, tokens, args.shards, args.shards))
    work = hours(config, options, tokens, args.tflops * 1e12)
    names = ("argument_bytes", "temporary_bytes", "peak_bytes", "device_bytes")
    cells = [
        [row["gpu"], row["devices"], row["program"], row["batch"], row["parameters"] / 1e6]
        + [row[name] / GIGABYTE for name in names]
        + ["yes" if row["peak_bytes"] < row["device_bytes"] else "NO"]
        for row in rows
    ]
    header = [
        "GPU",
        "of them",
        "step",
        "batch",
        "M weights",
        "arguments GB",
        "temporary GB",
        "peak GB",
        "GPU GB",
        "fits",
    ]
    print(f"one training step at {width} x {height}, bytes on each GPU\n{report.table(header, cells)}\n")
    print(f"a whole run at {args.tflops:g} TFLOP/s (assumed, not measured)")
    phases = [[row["phase"], row["forwards"], row["flop"] / 1e15, row["gpu_hours"]] for row in work]
    print(report.table(["phase", "forwards", "PFLOP", "GPU hours"], phases))
    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    figures = {"size": [width, height], "steps": rows, "hours": work, "assumed_tflops": args.tflops, "options": chosen}
    report.finish("distill", figures, save=args.save, on="none: compiled ahead of time, times from counted operations")


if __name__ == "__main__":
    raise SystemExit(report.run(main))
