"""The kernels' machine code for GPUs that are not here; and what `bench.aot` makes of code, by examples."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from bench import aot, report, sass
from bench.products import shapes
from flux_jax.config import dev

TILE = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
MOST_BARRIERS = 10  # of a kernel that rounds rows
CASE = aot.Case({"operand": "int8", "block_n": 128}, None, ())
LOOP = {"instructions": 5, "mma": 1, "alu": 2, "barriers": 1, "fences": 1, "waits": 1}
MMA = {"wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8": 8}
GOOD = sass.Code(128, 0, 65536, 256, MMA, instructions=100, barriers=4, loop=LOOP)
SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0020*/              @P0  IADD3 R1, R1, 0x40, RZ ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   FENCE.VIEW.ASYNC.S ;
        /*0050*/                   LOP3.LUT R3, R3, 0xc0, RZ, 0xc0, !PT ;
        /*0060*/                   IGMMA.64x128x32.S8.S8 R24, R4, gdesc[UR4], R24 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/              @!P1 BRA `(.L_x_1) ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   FMUL R3, R3, R4 ;
        /*00b0*/                   EXIT ;
"""


def test_what_the_loop_holds_is_counted_within_it():
    code = sass.parse(SASS)
    assert len(code) == 12 and sass.count(code)["barriers"] == 2
    assert sass.loop(code) == LOOP | {"instructions": 7}
    assert sass.loop(sass.parse(SASS.replace("@!P1 BRA", "@!P1 NOP"))) == {}


def test_faults_are_told():
    assert aot.faults("h100", CASE, GOOD) == []
    assert aot.faults("h100", CASE, GOOD._replace(spilled_bytes=8)) == ["spills 8 bytes"]
    assert "101376" in aot.faults("a10", CASE, GOOD._replace(shared_bytes=101377, mma={"mma.sync.s32.s8.s8": 1}))[0]
    older = GOOD._replace(mma={"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": 8})
    assert aot.faults("h100", CASE, older) == ["has no wgmma of int8"]
    assert aot.faults("a100", CASE, older) == []
    serial = GOOD._replace(loop=LOOP | {"waits": 32})
    assert aot.faults("h100", CASE, serial) == ["waits 32 times for its MMAs in a turn of its loop"]


def test_blocks_that_fit_a_multiprocessor():
    assert aot.blocks("h100", GOOD) == 2  # by registers: 65536 // (128 x 256)
    assert aot.blocks("h100", GOOD._replace(registers=64)) == 3  # by shared memory: 233472 // 66560
    assert aot.blocks("h100", GOOD._replace(registers=16, shared_bytes=0)) == 8  # by threads: 2048 // 256


@pytest.mark.parametrize("gpu", aot.GPUS)
def test_the_committed_table_is_of_these_kernels(gpu):
    """`bench/results/aot.json` has a fit row for every kernel, shape and setting that this GPU would be given now."""
    committed = json.loads((report.RESULTS / "aot.json").read_text())["figures"]["kernels"]
    rows = [row for row in committed if row["gpu"] == gpu]
    cases = list(aot.kernels(gpu))
    assert [{name: row[name] for name in case.labels} for case, row in zip(cases, rows, strict=True)] == [
        case.labels for case in cases
    ]
    products = {tuple(row[name] for name in ("m", "n", "k", "operand")) for row in rows if row["kernel"] == "matmul"}
    assert products == {(m, n, k, operand) for n, k in shapes(dev()) for m in aot.ROWS for operand in aot.TYPES}
    assert not any(row["faults"] or row["spilled_bytes"] for row in rows)
    assert all(row["barriers"] <= MOST_BARRIERS for row in rows if row["kernel"].endswith(", int8") and "k" not in row)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not any(map(importlib.util.find_spec, aot.aot.PLUGINS)), reason="needs JAX's CUDA plugin (aot)")
@pytest.mark.parametrize("gpu", ["h100", "a10"])
def test_every_kernel_of_flux_compiles_for_a_gpu_that_is_not_here(gpu):
    """One of each kernel and tile; the committed table has them all."""
    command = [sys.executable, "-m", "bench.aot", "--quick", "--gpus", gpu]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])["figures"]
    assert figures["wrong"] == 0
    for row in figures["kernels"]:
        assert row["faults"] == [] and row["spilled_bytes"] == 0
        assert 16 <= row["registers"] <= 255
        assert row["shared_bytes"] <= aot.aot.target(gpu).architecture.shared_memory_per_block
    tried = {tuple(row.get(name) for name in ("kernel", "operand", *TILE)) for row in figures["kernels"]}
    assert tried == {tuple(case.labels.get(name) for name in ("kernel", "operand", *TILE)) for case in aot.kernels(gpu)}
