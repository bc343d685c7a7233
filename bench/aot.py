"""`python -m bench.aot`: the kernels' machine code for GPUs that are not here: registers, spills, shared memory, MMAs.

In: names of GPUs. For each, every (n, k) of FLUX's ternary layers, with many rows and with one, in both kinds of
activations, with the settings that would be used there (measured ones where there are any, else the heuristic); and the
fused kernels. Out: a table, and the JSON line. Exit status 1 if a kernel spills a register, exceeds the device's shared
memory, multiplies without tensor cores, or waits for each product by itself. Needs what `bench.sass` needs, and no GPU.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench import report, sass
from bench.kernels import shape
from bench.products import shapes
from flux_jax.config import dev
from flux_jax.errors import UserError
from flux_jax.runtime import aot
from pallas_kernels import Target, epilogues, fused, packed_width

GPUS = ("a10", "a100", "h100", "l20")
ROWS = (4608, 1)  # tokens of a 1024 x 1024 picture and its text; the modulation of one step
TYPES = {"int8": ".s8.s8", "bfloat16": ".bf16.bf16"}  # of an MMA's operands, in the names of PTX
LOOP = ("mma", "alu", *sass.STOPS)  # what the table says of a loop
MOST_WAITS = 4  # of a loop on Hopper: a wait for each part of a step, but not for each MMA in it


class Case(NamedTuple):
    """A kernel to compile: its name and figures for the table, the function, and its arguments' shapes and dtypes."""

    labels: dict[str, Any]
    function: Any
    args: tuple[Any, ...]


def kernels(gpu: str, wanted: Sequence[tuple[int, int]] | None = None) -> Iterator[Case]:
    """Every ternary product of FLUX (or those with n, k `wanted`) with the settings that it gets on this GPU, and the
    fused kernels."""
    from pallas_kernels import triton, triton_rows  # deprecated in JAX: only who asks for its code needs it

    described, config = aot.target(gpu), dev()
    target = Target("gpu", "{}.{}".format(*described.architecture.compute_capability), described.kind)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def product(name: str, m: int, n: int, k: int, operand: str, epilogue: Any = None) -> Case:
        settings = fused.epilogue_tiles(target, m, n, k, operand, epilogue)
        out_dtype = jnp.int8 if isinstance(epilogue, epilogues.GeluQuantize) else jnp.bfloat16

        def function(*args: Any) -> Any:
            whole = None if epilogue is None else type(epilogue)(*args[5:])
            return triton.matmul(*args[:5], settings=settings, out_dtype=out_dtype, epilogue=whole)

        row_scale = array(jnp.float32, m) if operand == "int8" else None
        weights = array(jnp.uint8, n, packed_width(k)), array(jnp.float32, n), array(jnp.bfloat16, n)
        labels = {"kernel": name, "m": m, "n": n, "k": k, "operand": operand} | dataclasses.asdict(settings)
        return Case(labels, function, (array(operand, m, k), row_scale, *weights, *(epilogue or ())))

    for n, k in wanted or shapes(config):
        for m in ROWS:
            yield from (product("matmul", m, n, k, operand) for operand in TYPES)
    m, model = ROWS[0], config.transformer
    d, hidden, head = model.hidden_size, model.mlp_dim, model.head_dim
    tokens, vector, norm = array(jnp.bfloat16, m, d), array(jnp.bfloat16, d), array(jnp.bfloat16, head)
    norm_args = tokens, vector, vector
    yield Case({"kernel": "norm, modulate, int8", "m": m, "n": d}, triton_rows.norm_modulate_quantize, norm_args)
    inner = array(jnp.bfloat16, m, hidden)
    for parts in ((tokens,), (inner,), (tokens, inner)):
        labels = {"kernel": "concatenate, int8", "m": m, "n": sum(part.shape[1] for part in parts)}
        yield Case(labels, triton_rows.concatenate_quantize, parts)
    for k in (d, hidden, d + hidden):
        yield product("matmul, gate, residual", m, d, k, "int8", epilogues.GatedResidual(vector, tokens))
    rope = array(jnp.float32, 2, m, head // 2)
    yield product("matmul, norm, rotary", m, d, d, "int8", epilogues.NormRope(norm, rope))
    yield product("matmul, gelu", m, hidden, d, "int8", epilogues.Gelu())
    yield product("matmul, gelu, int8", m, hidden, d, "int8", epilogues.GeluQuantize(array(jnp.float32)))


def faults(gpu: str, case: Case, code: sass.Code) -> list[str]:
    """What is wrong with a kernel's code, in words."""
    architecture, found = aot.target(gpu).architecture, []
    if code.spilled_bytes:
        found.append(f"spills {code.spilled_bytes} bytes")
    if code.shared_bytes > architecture.shared_memory_per_block:
        found.append(f"wants {code.shared_bytes} bytes of shared memory of {architecture.shared_memory_per_block}")
    if operand := case.labels.get("operand"):
        # Hopper's own instruction multiplies 64 channels for four warps; smaller tiles take the older one.
        wide = architecture.accelerated and case.labels["block_n"] >= 64
        wanted = f"{'wgmma' if wide else 'mma'} of {operand}"
        if not any(name.startswith("wgmma" if wide else "mma") and TYPES[operand] in name for name in code.mma):
            found.append(f"has no {wanted}")
        if code.loop.get("waits", 0) > MOST_WAITS:
            found.append(f"waits {code.loop['waits']} times for its MMAs in a turn of its loop")
    return found


def blocks(gpu: str, code: sass.Code) -> int:
    """How many blocks of threads a multiprocessor can hold at once."""
    architecture = aot.target(gpu).architecture
    registers = -(-code.registers // 8) * 8 * code.threads
    shared = code.shared_bytes + 1024  # what CUDA reserves for each block
    held = (
        65536 // registers,
        architecture.shared_memory_per_core // shared,
        architecture.threads_per_core // code.threads,
    )
    return min(held)


def one_of_each(cases: Iterable[Case]) -> list[Case]:
    """The first case of each kernel, operand and tile: in others a loop has more turns, and the code is the same."""
    sizes = ("m", "n", "k")
    found: dict[tuple[Any, ...], Case] = {}
    for case in cases:
        found.setdefault(tuple(value for name, value in case.labels.items() if name not in sizes), case)
    return list(found.values())


def measure(gpu: str, wanted: Sequence[tuple[int, int]] | None = None, quick: bool = False) -> Iterator[dict[str, Any]]:
    """The figures of every kernel on one GPU, or with `quick` of `one_of_each`."""
    cases = kernels(gpu, wanted)
    for case in one_of_each(cases) if quick else cases:
        report.say(f"{gpu}: {' '.join(str(value) for value in case.labels.values())}")
        code = sass.inspect(gpu, case.function, case.args)
        extra = {"blocks_per_multiprocessor": blocks(gpu, code), "faults": faults(gpu, case, code)}
        yield {"gpu": gpu, **case.labels, **code._asdict(), **extra}


def line(row: dict[str, Any]) -> list[Any]:
    tile = "x".join(str(row[f"block_{axis}"]) for axis in "mnk") if "block_m" in row else None
    tile = tile and f"{tile} w{row['num_warps']} s{row['num_stages']}"
    names = [name.replace("wgmma.mma_async", "wgmma").replace(".sync.aligned", "") for name in row["mma"]]
    mma = " ".join(sorted({re.sub(r"\.(row|col|satfinite)", "", name) for name in names})) or None
    labels = [row["gpu"], row["kernel"], *map(row.get, ("m", "n", "k", "operand")), tile]
    code = [row["registers"], row["spilled_bytes"], f"{row['shared_bytes'] / 1024:.0f}"]
    loop = [row["loop"].get(name) for name in LOOP]
    return [*labels, *code, row["blocks_per_multiprocessor"], mma, *loop, ", ".join(row["faults"]) or "ok"]


def main(argv: Sequence[str]) -> None:
    parser = report.parser("aot", __doc__)
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), choices=list(aot.GPUS))
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxK", help="default: all of FLUX's")
    parser.add_argument("--quick", action="store_true", help="one shape for each kernel, operand and tile")
    args = parser.parse_args(argv)
    rows = [row for gpu in args.gpus for row in measure(gpu, args.shapes, args.quick)]
    sizes = ["m", "n", "k", "operand", "tile"]
    header = ["gpu", "kernel", *sizes, "regs", "spilled", "KiB", "blocks", "MMA", *LOOP, "verdict"]
    print(report.table(header, map(line, rows)))
    wrong = sum(bool(row["faults"]) for row in rows)
    report.finish("aot", {"wrong": wrong, "kernels": rows}, save=args.save, on=", ".join(args.gpus))
    if wrong:
        raise UserError(f"{wrong} kernels are not fit for their GPU: see the last column", 1)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
