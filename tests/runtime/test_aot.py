"""Programs compiled for GPUs that are not there: meant for the GPU that was named, and their figures right."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from reference_files import reference_file

from flux_jax.errors import UserError
from flux_jax.runtime import aot

ROOT = Path(__file__).parents[2]
PRESENT = any(map(importlib.util.find_spec, aot.PLUGINS))


def needs_plugin(test):
    """Its marks: it takes minutes, and is about GPUs."""
    marks = pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not PRESENT, reason="needs the extra aot")
    for mark in marks:
        test = mark(test)
    return test


# All compiling in one process of its own, in which JAX starts as `flux_jax.runtime.aot` wants it to. The product is
# traced for the CPU first: what was traced for one device must not be taken for another.
SCRIPT = """
import json, re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from flux_jax.runtime import aot
from flux_jax.models.attention import attention
from flux_jax.models.layers import Linear
from flux_jax.models.fused_linear import modulated_linear
from flux_jax.models.ternary import TernaryLinear
from pallas_kernels import current_target, ternary_matmul
from pallas_kernels.epilogues import Gelu

shape = jax.ShapeDtypeStruct
token, packed = shape((256, 128), jnp.bfloat16), shape((384, 32), jnp.uint8)
traced = []

@jax.jit
def product(x, packed, scale):
    traced.append(current_target().name)
    return ternary_matmul(x, packed, scale, activations="int8")

product.lower(token, packed, shape((384,), jnp.float32))
found = {}
for name in sys.argv[2:]:
    dump = Path(sys.argv[1]) / name
    compiled = aot.compile_for(name, product, token, packed, shape((384,), jnp.float32), dump=dump)
    memory = compiled.memory_analysis()
    found[name] = {
        "arguments": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "traced": traced[-1],
        "triton": "triton" in compiled.as_text(),
        "ptx": "".join(path.read_text() for path in dump.glob("*.ptx")),
    }
query = shape((1, 48, 2, 64), jnp.bfloat16)
found["cudnn"] = aot.compile_for("a10", jax.jit(attention), query, query, query).as_text()

def text(function, *args, dump=None):
    options = {"xla_gpu_enable_triton_gemm": dump is not None}  # else by cuBLAS, in code of its own
    return aot.compile_for("h100", jax.jit(function), *args, dump=dump, compiler_options=options).as_text()

# The front of a single block with ternary weights and 16-bit activations, at FLUX's size: values, and the MLP's half.
d, hidden = 3072, 12288
weights = shape((d + hidden, d // 4), jnp.uint8), shape((d + hidden,), jnp.float32), shape((d + hidden,), jnp.bfloat16)
front = lambda x, shift, *weights: modulated_linear(
    TernaryLinear(*weights, d_in=d), x, shift, shift, (d, None), (hidden, Gelu())
)
tokens, shift = shape((1, 4608, d), jnp.bfloat16), shape((1, d), jnp.bfloat16)
program = text(front, tokens, shift, *weights)
found["epilogues"] = sorted(re.findall(r'"epilogue":"(\\w+)"', program))
found["passes"] = re.findall(r" = bf16\\[(?:1,)?4608,(?:3072|12288)\\]\\S* fusion\\(", program)

linear, query = nnx.eval_shape(lambda: Linear(256, 384, rngs=nnx.Rngs(0))), shape((1, 128, 2, 64), jnp.float32)
rows, codes = shape((256, 256), jnp.float32), (shape((384, 64), jnp.uint8), shape((384,), jnp.float32))
float32 = {
    "unasked": (lambda x: x @ x, rows),
    "linear": (lambda linear, x: linear(x), linear, rows),
    "attention": (lambda q: attention(q, q, q), query),
    "A16": (lambda x, *codes: ternary_matmul(x, *codes, implementation="xla"), rows, *codes),
    "kernel": (lambda x, *codes: ternary_matmul(x, *codes, implementation="triton"), rows, *codes),
}
for name, (function, *args) in float32.items():
    dump = Path(sys.argv[1]) / name
    text(function, *args, dump=dump)
    found[name] = "".join(path.read_text() for path in dump.glob("*.ptx"))
mesh = aot.mesh("h100", (2, 2), ("data", "model"))
rows = shape((256, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "model")))
whole = shape((256, 64), jnp.float32)
sharded = aot.compile_for(mesh, jax.jit(lambda a, b: (a * 2, b.sum())), rows, whole)
found["sharded"] = sharded.memory_analysis().argument_size_in_bytes
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    dump, quiet = tmp_path_factory.mktemp("dump"), "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
    words = [sys.executable, "-W", "error", "-W", quiet, "-c", SCRIPT, str(dump), "h100", "a10"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_plugin
@pytest.mark.parametrize(("name", "target", "product"), [("h100", "sm_90a", "wgmma"), ("a10", "sm_86", "mma.sync")])
def test_programs_are_meant_for_the_gpu_named(found, name, target, product):
    program = found[name]
    assert program["traced"] == aot.target(name).kind
    assert program["triton"]  # and not XLA's product, which the host would have got
    assert f".target {target}" in program["ptx"]
    assert product in program["ptx"]


@needs_plugin
def test_memory_is_that_of_the_arguments_and_results(found):
    assert found["h100"]["arguments"] == 256 * 128 * 2 + 384 * 32 + 384 * 4
    assert found["h100"]["output"] == 256 * 384 * 2


@needs_plugin
def test_attention_is_cudnns_on_a_gpu_that_is_not_there(found):
    assert "__cudnn$fmha" in found["cudnn"]


@needs_plugin
def test_bias_and_gelu_of_ternary_weights_are_cublas_epilogues(found):
    """Of two products of the same tokens, which XLA would join; the one pass over [4608, 3072] is the norm in front."""
    assert found["epilogues"] == ["BIAS", "BIAS_GELU"]
    assert len(found["passes"]) == 1


@needs_plugin
@pytest.mark.parametrize("program", ["linear", "attention", "A16", "kernel"])
def test_products_of_float32_are_not_rounded_to_tf32(found, program):
    assert "tf32" in found["unasked"]  # what a GPU does with float32 that nobody asks to keep
    assert ".entry" in found[program] and "tf32" not in found[program]


@needs_plugin
def test_shardings_over_the_devices_are_kept(found):
    assert found["sharded"] == 256 * 64 * 4 // 4 + 256 * 64 * 4  # a quarter of one, all of the other


@pytest.mark.skipif(PRESENT, reason="JAX's CUDA plugin is installed")
def test_without_the_plugin_one_sentence_names_the_extra(snapshot_message):
    with snapshot_message.raises(UserError, "[aot]"):
        aot.compile_for("h100", jax.jit(jnp.sin), jnp.ones(3))


def test_gpus_are_known_by_name_in_any_case(snapshot_message):
    assert aot.target("H100").architecture.name == "sm_90a"
    assert aot.target("l20").architecture.name == "sm_89"
    with snapshot_message.raises(UserError, "b200", "a10, a100"):
        aot.target("b200")


@pytest.mark.parametrize("name", aot.GPUS)
def test_descriptions_hold_what_the_public_files_hold(name):
    """Against descriptions written by someone else, field by field."""
    path = reference_file(f"gpu_targets/{name}.txtpb")

    def fields(text):
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return {line.partition(":")[0]: line for line in lines if line and line != "}"}

    ours, theirs = fields(aot.target(name).description()), fields(path.read_text())
    loose = {"memory_bandwidth"}  # theirs to the byte, ours as datasheets round it
    assert {k: v for k, v in ours.items() if k not in loose} == {k: v for k, v in theirs.items() if k not in loose}
    ours, theirs = (int(each["memory_bandwidth"].partition(":")[2]) for each in (ours, theirs))
    assert ours == pytest.approx(theirs, rel=1e-3)
