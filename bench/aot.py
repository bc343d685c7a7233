"""`python -m bench.aot`: the kernels' machine code for GPUs that are not here: registers, spills, shared memory, MMAs.

In: names of GPUs. For each, every (n, k) of FLUX's ternary layers, with many rows and with one, in both kinds of
activations, with the settings that would be used there (measured ones where there are any, else the heuristic); and the
fused kernels. Out: a table, and the JSON line. Exit status 1 if a kernel spills a register, exceeds the device's shared
memory, or multiplies without tensor cores. Needs JAX's CUDA plugin and ptxas (the extra `aot`), and no GPU; with
nvdisasm, too, the loop's arithmetic instructions per MMA are counted.

How: XLA's dump of the compiled program holds the PTX and the kernel's shared memory; `ptxas -v` says the rest.
"""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench import report
from bench.products import shapes
from flux_jax import aot
from flux_jax.config import dev
from flux_jax.errors import UserError
from pallas_kernels import Target, fused, packed_width
from pallas_kernels.settings import choose_settings

GPUS = ("a10", "a100", "h100", "l20")
ROWS = (4608, 1)  # tokens of a 1024 x 1024 picture and its text; the modulation of one step
TYPES = {"int8": ".s8.s8", "bfloat16": ".bf16.bf16"}  # of an MMA's operands, in the names of PTX
# Instructions of SASS that the arithmetic units execute: what a loop needs besides loads, barriers and MMAs.
ALU = {"F2F", "F2I", "FADD", "FFMA", "FMNMX", "FMUL", "FSEL", "FSETP", "I2F", "I2FP", "IADD3", "IMAD", "IMNMX", "ISETP"}
ALU |= {"LEA", "LOP3", "MOV", "PRMT", "SEL", "SHF", "VIADD"}
MMA = {"HGMMA", "HMMA", "IGMMA", "IMMA"}


class Case(NamedTuple):
    """A kernel to compile: its name and figures for the table, the function, and its arguments' shapes and dtypes."""

    labels: dict[str, Any]
    function: Any
    args: tuple[Any, ...]


class Code(NamedTuple):
    """What became of it. shared_bytes: of a block of threads; mma: how many instructions, by their names in PTX."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    mma: dict[str, int]
    alu_per_mma: float | None


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from the wheels beside JAX's plugin, else on the PATH, else None."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [f"{place}/cu13/bin" for place in (nvidia.submodule_search_locations if nvidia else None) or ()]
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def inspect(gpu: str, case: Case) -> Code:
    """Compiles one kernel for a GPU and reads its code. UserError without ptxas, or where it refuses the kernel."""
    ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")
    if ptxas is None:
        raise UserError("no ptxas was found: pip install 'flux-jax-ternary[aot]', or put a CUDA toolkit on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        aot.compile_for(gpu, jax.jit(case.function), *case.args, dump=dump)
        (ptx,) = (path for path in dump.glob("*.ptx") if ".entry" in path.read_text())
        (launch,) = re.findall(r"threads: \[(\d+).*shared_memory: (\d+)", _only(dump.glob("*thunk_sequence.txt")))
        cubin = dump / "kernel.cubin"
        command = [ptxas, "-v", f"-arch={aot.target(gpu).architecture.name}", str(ptx), "-o", str(cubin)]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            raise UserError(f"ptxas refuses the kernel {case.labels} for {gpu}: {said.stderr.strip()}")
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said.stderr)))
        registers = max(map(int, re.findall(r"Used (\d+) registers", said.stderr)))
        mma = Counter(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)[\w.:]*", ptx.read_text()))
        sass = nvdisasm and subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True).stdout
        return Code(registers, spilled, int(launch[1]), int(launch[0]), dict(mma), alu_per_mma(sass) if sass else None)


def _only(paths: Iterator[Path]) -> str:
    (path,) = paths
    return path.read_text()


def alu_per_mma(sass: str) -> float | None:
    """Arithmetic instructions per MMA in the longest loop that has any; None if there is no such loop."""
    labels, code = {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*);", line):
            code.append((found[1], found[2]))
    loops = []
    for end, (operation, rest) in enumerate(code):
        start = labels.get(next(iter(re.findall(r"\.L_x_\d+", rest)), ""), end) if operation == "BRA" else end
        counts = Counter(name for name, _ in code[start:end])
        mma, alu = (sum(counts[name] for name in kind) for kind in (MMA, ALU))
        if mma:
            loops.append((mma, alu / mma))
    return max(loops)[1] if loops else None


def kernels(gpu: str, wanted: Sequence[tuple[int, int]] | None = None) -> Iterator[Case]:
    """Every ternary product of FLUX (or those with n, k `wanted`) with the settings that it gets on this GPU, and the
    fused kernels."""
    from pallas_kernels import triton  # deprecated in JAX: only who asks for its code needs it

    described, config = aot.target(gpu), dev()
    target = Target("gpu", "{}.{}".format(*described.architecture.compute_capability), described.kind)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def product(name: str, m: int, n: int, k: int, operand: str, epilogue: Any = None) -> Case:
        settings = fused.epilogue_settings(choose_settings(target, m, n, k, operand), epilogue)
        out_dtype = jnp.int8 if isinstance(epilogue, fused.GeluQuantize) else jnp.bfloat16

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
    yield Case(
        {"kernel": "norm, modulate, int8", "m": m, "n": d}, triton.norm_modulate_quantize, (tokens, vector, vector)
    )
    for k in (d, hidden, d + hidden):
        yield product("matmul, gate, residual", m, d, k, "int8", fused.GatedResidual(vector, tokens))
    rope = array(jnp.float32, 2, m, head // 2)
    yield product("matmul, norm, rotary", m, d, d, "int8", fused.NormRotary(norm, rope))
    yield product("matmul, gelu", m, hidden, d, "int8", fused.Gelu())
    yield product("matmul, gelu, int8", m, hidden, d, "int8", fused.GeluQuantize(array(jnp.float32)))


def faults(gpu: str, case: Case, code: Code) -> list[str]:
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
    return found


def blocks(gpu: str, code: Code) -> int:
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


def measure(gpu: str, wanted: Sequence[tuple[int, int]] | None = None) -> Iterator[dict[str, Any]]:
    """The figures of every kernel on one GPU."""
    for case in kernels(gpu, wanted):
        report.say(f"{gpu}: {' '.join(str(value) for value in case.labels.values())}")
        code = inspect(gpu, case)
        extra = {"blocks_per_multiprocessor": blocks(gpu, code), "faults": faults(gpu, case, code)}
        yield {"gpu": gpu, **case.labels, **code._asdict(), **extra}


def line(row: dict[str, Any]) -> list[Any]:
    tile = "x".join(str(row[f"block_{axis}"]) for axis in "mnk") if "block_m" in row else None
    tile = tile and f"{tile} w{row['num_warps']} s{row['num_stages']}"
    names = [name.replace("wgmma.mma_async", "wgmma").replace(".sync.aligned", "") for name in row["mma"]]
    mma = " ".join(sorted({re.sub(r"\.(row|col|satfinite)", "", name) for name in names})) or None
    labels = [row["gpu"], row["kernel"], *map(row.get, ("m", "n", "k", "operand")), tile]
    code = [row["registers"], row["spilled_bytes"], f"{row['shared_bytes'] / 1024:.0f}"]
    alu = None if row["alu_per_mma"] is None else round(row["alu_per_mma"], 1)
    return [*labels, *code, row["blocks_per_multiprocessor"], mma, alu, ", ".join(row["faults"]) or "ok"]


def shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)


def main(argv: Sequence[str]) -> None:
    parser = report.parser("aot", __doc__)
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), choices=list(aot.GPUS))
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxK", help="default: all of FLUX's")
    args = parser.parse_args(argv)
    rows = [row for gpu in args.gpus for row in measure(gpu, args.shapes)]
    sizes = ["m", "n", "k", "operand", "tile"]
    header = ["gpu", "kernel", *sizes, "regs", "spilled", "KiB", "blocks", "MMA", "ALU/MMA", "verdict"]
    print(report.table(header, map(line, rows)))
    wrong = sum(bool(row["faults"]) for row in rows)
    report.finish("aot", {"wrong": wrong, "kernels": rows}, save=args.save, on=", ".join(args.gpus))
    if wrong:
        raise UserError(f"{wrong} kernels are not fit for their GPU: see the last column", 1)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
