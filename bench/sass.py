"""A kernel's machine code for a GPU that is not here: registers, spills, shared memory, MMAs, what its loop waits for.

In: the name of a GPU, a function that becomes one kernel, its arguments' shapes and dtypes. Out: `Code`. XLA's dump of
the compiled program holds the PTX and the kernel's shared memory; `ptxas -v` says registers and spills; nvdisasm's text
says what is in the loop. Needs JAX's CUDA plugin, ptxas and nvdisasm (the extra `aot`).
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flux_jax.errors import UserError
from flux_jax.runtime import aot

# Instructions of SASS that the arithmetic units execute: what a loop needs besides loads, barriers and MMAs.
ALU = {"F2F", "F2I", "FADD", "FFMA", "FMNMX", "FMUL", "FSEL", "FSETP", "I2F", "I2FP", "IADD3", "IMAD", "IMNMX", "ISETP"}
ALU |= {"LEA", "LOP3", "MOV", "PRMT", "SEL", "SHF", "VIADD"}
MMA = {"HGMMA", "HMMA", "IGMMA", "IMMA"}
# What a warp stops at, by how nvdisasm writes it: a barrier of the block, a fence of memory, and the wait until all
# MMAs that were begun are done.
STOPS = {
    "barriers": re.compile(r"BAR\.(SYNC|RED)"),
    "fences": re.compile(r"(MEMBAR|FENCE)\."),
    "waits": re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0"),
}


class Code(NamedTuple):
    """What became of a kernel. shared_bytes: of a block of threads; mma: how many instructions, by their names in PTX;
    barriers: of the block, in the whole kernel; loop: counts of the longest loop with MMAs, {} without one."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    mma: dict[str, int]
    instructions: int
    barriers: int
    loop: dict[str, int]


def tool(name: str) -> str:
    """A program of the CUDA toolkit: from the wheels beside JAX's plugin, else on the PATH. UserError without it."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [f"{place}/cu13/bin" for place in (nvidia.submodule_search_locations if nvidia else None) or ()]
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        raise UserError(f"no {name} was found: pip install 'flux-jax-ternary[aot]', or put a CUDA toolkit on the PATH")
    return found


def inspect(gpu: str, function: Any, args: tuple[Any, ...]) -> Code:
    """Compiles one kernel for a GPU and reads its code. UserError without the tools, or where ptxas refuses it."""
    ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        aot.compile_for(gpu, jax.jit(function), *args, dump=dump)
        (ptx,) = (path for path in dump.glob("*.ptx") if ".entry" in path.read_text())
        (launch,) = re.findall(r"threads: \[(\d+).*shared_memory: (\d+)", _only(dump.glob("*thunk_sequence.txt")))
        cubin = dump / "kernel.cubin"
        command = [ptxas, "-v", f"-arch={aot.target(gpu).architecture.name}", str(ptx), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"ptxas refuses the kernel for {gpu}: {done.stderr.strip()}")
        sass = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        mma = Counter(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)[\w.:]*", ptx.read_text()))
    code = parse(sass)
    return Code(
        registers=max(map(int, re.findall(r"Used (\d+) registers", done.stderr))),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))),
        shared_bytes=int(launch[1]),
        threads=int(launch[0]),
        mma=dict(mma),
        instructions=len(code),
        barriers=count(code)["barriers"],
        loop=loop(code),
    )


def _only(paths: Iterator[Path]) -> str:
    (path,) = paths
    return path.read_text()


def parse(sass: str) -> list[str]:
    """The instructions without their predicates; a branch to a label names the index of its target instead.

    nvdisasm writes a loop as the left side; the right side is what comes out, of which `loop` takes the last three:

                /*0000*/  MOV R1, c[0x0][0x28] ;                 MOV R1, c[0x0][0x28]
        .L_x_0:
                /*0010*/  HMMA.16816.F32 R4, R8, R2, R4 ;        HMMA.16816.F32 R4, R8, R2, R4
                /*0020*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;          BAR.SYNC.DEFER_BLOCKING 0x0
                /*0030*/  @P0 BRA `(.L_x_0) ;                    BRA @1
    """
    labels, code = {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+.*?)\s*;", line):
            code.append(found[1])
    return [re.sub(r"`\((\.L_x_\d+)\)", lambda found: f"@{labels.get(found[1], -1)}", text) for text in code]


def loop(code: list[str]) -> dict[str, int]:
    """What the longest loop with MMAs holds: instructions, mma, alu, and `STOPS`; {} where there is none."""
    loops = []
    for end, text in enumerate(code):
        target = re.match(r"BRA.*@(\d+)", text)
        if target and int(target[1]) < end:
            loops.append(count(code[int(target[1]) : end]))
    return max((found for found in loops if found["mma"]), key=lambda found: found["mma"], default={})


def count(code: list[str]) -> dict[str, int]:
    names = Counter(re.match(r"[A-Z0-9]+", text)[0] for text in code)
    stops = {name: sum(bool(pattern.match(text)) for text in code) for name, pattern in STOPS.items()}
    mma, alu = (sum(names[name] for name in kind) for kind in (MMA, ALU))
    return {"instructions": len(code), "mma": mma, "alu": alu, **stops}
