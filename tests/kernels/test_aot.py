"""The kernels' machine code for GPUs that are not here; and what `bench.aot` makes of code, by examples."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from bench import aot, report
from bench.products import shapes
from flux_jax.config import dev

CASE = aot.Case({"operand": "int8", "block_n": 128}, None, ())
GOOD = aot.Code(128, 0, 65536, 256, {"wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8": 8}, 10.0)
SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0020*/              @P0  IADD3 R1, R1, 0x40, RZ ;
        /*0030*/                   LOP3.LUT R3, R3, 0xc0, RZ, 0xc0, !PT ;
        /*0040*/                   IGMMA.64x128x32.S8.S8 R24, R4, gdesc[UR4], R24 ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   FMUL R3, R3, R4 ;
        /*0070*/                   EXIT ;
"""


def test_arithmetic_is_counted_within_the_loop():
    assert aot.alu_per_mma(SASS) == 2
    assert aot.alu_per_mma(SASS.replace("@!P1 BRA", "@!P1 NOP")) is None


def test_faults_are_told():
    assert aot.faults("h100", CASE, GOOD) == []
    assert aot.faults("h100", CASE, GOOD._replace(spilled_bytes=8)) == ["spills 8 bytes"]
    assert "101376" in aot.faults("a10", CASE, GOOD._replace(shared_bytes=101377, mma={"mma.sync.s32.s8.s8": 1}))[0]
    older = GOOD._replace(mma={"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": 8})
    assert aot.faults("h100", CASE, older) == ["has no wgmma of int8"]
    assert aot.faults("a100", CASE, older) == []


def test_blocks_that_fit_a_multiprocessor():
    assert aot.blocks("h100", GOOD) == 2  # by registers: 65536 // (128 x 256)
    assert aot.blocks("h100", GOOD._replace(registers=64)) == 3  # by shared memory: 233472 // 66560
    assert aot.blocks("h100", GOOD._replace(registers=16, shared_bytes=0)) == 8  # by threads: 2048 // 256


@pytest.mark.parametrize("gpu", aot.GPUS)
def test_the_committed_table_is_of_these_kernels(gpu):
    """`bench/results/aot.json` has a fit row for every kernel, shape and setting that this GPU would be given now."""
    committed = json.loads((report.RESULTS / "aot.json").read_text())["figures"]["kernels"]
    rows = [row for row in committed if row["gpu"] == gpu]
    assert [{name: row[name] for name in case.labels} for case, row in zip(aot.kernels(gpu), rows, strict=True)] == [
        case.labels for case in aot.kernels(gpu)
    ]
    assert not any(row["faults"] or row["spilled_bytes"] for row in rows)


@pytest.mark.skipif(not any(map(importlib.util.find_spec, aot.aot.PLUGINS)), reason="needs JAX's CUDA plugin (aot)")
@pytest.mark.skipif(aot.tool("ptxas") is None, reason="needs ptxas (extra aot)")
@pytest.mark.parametrize("gpu", aot.GPUS)
def test_every_kernel_of_flux_compiles_for_a_gpu_that_is_not_here(gpu):
    command = [sys.executable, "-m", "bench.aot", "--gpus", gpu]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])["figures"]
    assert figures["wrong"] == 0
    for row in figures["kernels"]:
        assert row["faults"] == [] and row["spilled_bytes"] == 0
        assert 16 <= row["registers"] <= 255
        assert row["shared_bytes"] <= aot.aot.target(gpu).architecture.shared_memory_per_block
    products = {
        (row["m"], row["n"], row["k"], row["operand"]) for row in figures["kernels"] if row["kernel"] == "matmul"
    }
    assert products == {(m, n, k, o) for n, k in shapes(dev()) for m in aot.ROWS for o in aot.TYPES}
