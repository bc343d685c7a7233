"""`python -m bench.memory`: what the denoising loop of FLUX.1-dev takes on a GPU, in bf16 and with ternary weights.

In: names of GPUs, none of which has to be there. Out: for each GPU and kind of weights the argument, temporary and
output bytes of the whole loop (all steps, one picture) as XLA compiled it for that GPU, what of the model the loop
reads, and which attention and ternary kernels are in it; then the bits that a ternary weight takes in memory and on
disk. Needs the extra `aot`.
"""

import argparse
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import report
from flux_jax.cli.arguments import parse_size
from flux_jax.config import FluxConfig, dev, nano
from flux_jax.models.params import abstract_component, nbytes
from flux_jax.models.quantize import METHODS, abstract_ternary, ternarize, ternary_paths
from flux_jax.runtime import aot
from flux_jax.sampling.programs import abstract_inputs, denoise
from pallas_kernels import pack_ternary

WEIGHTS = {"bf16": None, "ternary A16": "bf16", "ternary A8": "int8"}  # kind of weights -> activations of its layers
GPUS = ("a10", "l20", "a100", "h100")
GIGABYTE = 1e9


def abstract_transformer(config: FluxConfig, weights: str) -> nnx.Module:
    """The transformer with weights of that kind and all else bf16; shapes for arrays."""
    activations = WEIGHTS[weights]
    if activations is None:
        return abstract_component("transformer", config, jnp.bfloat16)
    return abstract_ternary(config, jnp.bfloat16, activations=activations)


def measure(gpu: str, weights: str, config: FluxConfig, steps: int, tokens: int) -> dict[str, Any]:
    """The figures of one compiled loop; all sizes in bytes."""
    transformer = abstract_transformer(config, weights)
    inputs = abstract_inputs(config.transformer, steps, tokens, config.sampling.max_sequence_length, jnp.bfloat16)
    compiled = aot.compile_for(gpu, denoise, transformer, *inputs)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    figures = {
        "gpu": gpu,
        "device": aot.target(gpu).kind,
        "weights": weights,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    figures["total_bytes"] = sum(figures[f"{kind}_bytes"] for kind in ("argument", "temporary", "output"))
    read, modulation = read_in_loop(text, transformer)
    return figures | {
        "model_bytes": nbytes(transformer),
        "model_bytes_in_loop": read,
        "modulation_bytes_in_loop": modulation,
        "cudnn_attention_calls": text.count('custom_call_target="__cudnn$fmha'),
        "triton_kernel_calls": len(re.findall(r'custom_call_target="__gpu\$xla\.gpu\.triton"', text)),
    }


def image_tokens(config: FluxConfig, width: int, height: int) -> int:
    """Of a picture of so many pixels."""
    return (width // config.pixels_per_token) * (height // config.pixels_per_token)


def read_in_loop(text: str, transformer: nnx.Module) -> tuple[int, int]:
    """Bytes of the model's leaves, and among them of its modulation layers, that reach the loop over the steps.

    Whatever a loop of XLA reads is in the tuple that it carries. So each leaf is looked for there by dtype and shape:
    a modulation layer has a shape that no other layer has. ValueError if the program has no such loop.
    """
    loop = re.search(r'%\S+ = \((.*?)\) while\(.*op_name="jit\(denoise\)/denoise/while"', text)
    if loop is None:
        raise ValueError("the compiled program has no loop over the steps")
    carried = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", loop[1])
    read = modulation = 0
    for path, leaf in nnx.to_flat_state(nnx.state(transformer)):
        name = {"bfloat16": "bf16", "float32": "f32", "uint8": "u8"}[str(leaf.dtype)]
        if (name, ",".join(map(str, leaf.shape))) in carried:
            read += nbytes(leaf)
            modulation += nbytes(leaf) if path[-2] == "mod" and leaf.ndim > 2 else 0
    return read, modulation


def copied_in_loop(text: str) -> int:
    """Bytes of weights that each step of a compiled loop copies out of the stacks of its layers.

    A copy is a computation whose result is nothing but the slice [1, n, k] of an operand [layers, n, k]. The loop over
    the layers runs it once for each, so that a step copies the whole stack. A slice that is used within its computation
    is read where it lies, and does not count.
    """
    copied = 0
    for computation in re.findall(r"^%\S+ \(.*?^}", text, re.MULTILINE | re.DOTALL):
        calls = re.findall(r"(%\S+) = (?:\(.*?\)|\S+) ([a-z-]+)\((.*?)\)", computation)
        operations = {name: (kind, re.findall(r"%[^\s,]+", operands)) for name, kind, operands in calls}
        types = {name: found for name, *found in re.findall(r"(%\S+) = [a-z]+(\d+)[a-z\d]*\[([\d,]*)\]", computation)}
        results = re.findall(r"^  ROOT (%\S+)", computation, re.MULTILINE)
        while results:
            result = results.pop()
            kind, operands = operations.get(result, ("", []))
            if kind in ("bitcast", "copy", "tuple"):
                results += operands
            elif kind == "dynamic-slice" and operands[0] in types:
                bits, dims = types[operands[0]]
                layers, *shape = map(int, dims.split(","))
                if len(shape) == 2 and min(shape) > 1 and types[result][1] == f"1,{shape[0]},{shape[1]}":
                    copied += layers * math.prod(shape) * int(bits) // 8
    return copied


def stored_bits(n: int, k: int, method: str, seed: int = 0) -> dict[str, float]:
    """Bits a weight of one layer [n, k] of normal weights, rounded by that method: in memory, and on disk as Orbax
    writes it (zstd). The codes' entropy is the least that any code of single weights could take."""
    from orbax.checkpoint import v1 as ocp

    codes, scale = ternarize(np.random.default_rng(seed).standard_normal((n, k), np.float32), method)
    tree = {"packed": np.asarray(pack_ternary(codes)), "scale": scale}
    with tempfile.TemporaryDirectory() as folder:
        ocp.save(Path(folder) / "layer", tree)
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    share = np.array([(codes == code).mean() for code in (-1, 0, 1)])
    return {
        "zeros": float(share[1]),
        "entropy": float(-(share * np.log2(share)).sum()),
        "disk": 8 * disk / codes.size,
        "memory": 8 * sum(part.nbytes for part in tree.values()) / codes.size,
    }


def sizes(config: FluxConfig, n: int, k: int) -> dict[str, Any]:
    """Bits a weight for each method of rounding, and from them the size on disk of a whole transformer."""
    weights = sum(math.prod(shape) for shape in ternary_paths(config).values())
    kept = abstract_transformer(config, "ternary A16")
    rest = sum(nbytes(leaf) for path, leaf in nnx.to_flat_state(nnx.state(kept)) if path[-1] != "packed")
    bits = {method: stored_bits(n, k, method) for method in METHODS}
    whole = {method: round(weights * found["disk"] / 8 + rest) for method, found in bits.items()}
    return {"layer": [n, k], "bits_per_weight": bits, "ternary_weights": weights, "estimated_disk_bytes": whole}


def ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to each row how many times smaller it is than bf16 on the same GPU, where that was measured."""
    whole = {row["gpu"]: row["total_bytes"] for row in rows if row["weights"] == "bf16"}
    for row in rows:
        row["times_smaller"] = round(whole[row["gpu"]] / row["total_bytes"], 3) if row["gpu"] in whole else None


def main(argv: Sequence[str]) -> None:
    args = options(argv)
    config = nano() if args.tiny else dev()
    width, height = args.size or (config.sampling.width, config.sampling.height)
    tokens = image_tokens(config, width, height)
    rows = []
    for gpu in args.gpus:
        for weights in args.weights:
            report.say(f"compiling for {gpu}: {weights}")
            rows.append(measure(gpu, weights, config, args.steps, tokens))
    ratios(rows)
    kinds = ("argument", "temporary", "output", "total")
    header = ["GPU", "weights", *(f"{kind} GB" for kind in kinds), "of bf16", "model in loop GB", "modulation in loop"]
    lines = [
        [
            row["gpu"],
            row["weights"],
            *(f"{row[f'{kind}_bytes'] / GIGABYTE:.3f}" for kind in kinds),
            row["times_smaller"] and f"1/{row['times_smaller']:.2f}",
            f"{row['model_bytes_in_loop'] / GIGABYTE:.3f}",
            row["modulation_bytes_in_loop"],
        ]
        for row in rows
    ]
    print(f"{config.name}, {width} x {height}, {args.steps} steps, one picture, compiled ahead of time\n")
    print(report.table(header, lines))
    shape = (128, 512) if args.tiny else (3072, 3072)
    bits = sizes(config, *shape)
    print("\nbits a ternary weight, in a layer {} x {} of normal weights\n".format(*bits["layer"]))
    methods = bits["bits_per_weight"].items()
    columns = ("zeros", "entropy", "disk", "memory")
    print(report.table(["rounded by", *columns], [[m, *(f"{b[c]:.3f}" for c in columns)] for m, b in methods]))
    for method, size in bits["estimated_disk_bytes"].items():
        print(f"whole transformer on disk, {method}: {size / GIGABYTE:.2f} GB (bits of that layer times all weights)")
    figures = {"model": config.name, "size": [width, height], "steps": args.steps, "programs": rows, "sizes": bits}
    report.finish("memory", figures, save=args.save, on=f"none: compiled ahead of time for {', '.join(args.gpus)}")


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = report.parser("memory", __doc__, tiny="FLUX-nano in place of FLUX.1-dev")
    add = parser.add_argument
    add("--gpus", nargs="+", default=GPUS, choices=sorted(aot.GPUS), metavar="GPU", help=f"of {', '.join(aot.GPUS)}")
    add("--weights", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS), help="kinds of weights")
    add("--size", type=parse_size, metavar="WxH", help="in pixels (default: the model's own)")
    add("--steps", type=int, default=50)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
