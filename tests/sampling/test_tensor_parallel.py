"""Pictures on several devices: eight of a CPU's stand for GPUs, in processes of their own."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from flux_jax.checkpoints import orbax_writer, writer
from flux_jax.cli import arguments, requests
from flux_jax.config import TransformerConfig
from flux_jax.errors import UserError
from flux_jax.runtime import aot
from flux_jax.sampling import tensor_parallel

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "a blue square", "two squares"]
ROUNDING = 2e-5  # of the final latents' largest value: sums of float32 in another order, through all steps
# An activation that float32's rounding moves over the edge between two int8 moves by a whole one of 127 there.
INT8_ROUNDING = 5e-3


def config():
    """Heads for four devices, and enough of them in each for the tiles of ternary weights."""

    tiny = tiny_model.config()
    wide = dataclasses.replace(tiny.transformer, hidden_size=512, num_heads=8, axes_dim=(16, 24, 24), mlp_ratio=2)
    return dataclasses.replace(tiny, transformer=wide)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folder of a checkpoint with float32, with ternary, and with damaged ternary weights."""
    # Chunks as small beside these weights as real ones are beside FLUX's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_writer, "CHUNK_BYTES", 2**20)
        return save_models(tmp_path_factory.mktemp("models"))


def save_models(folder: Path) -> dict[str, Path]:
    made = {}
    modules = tiny_model.modules(config())
    words = tiny_model.tokenizers(folder / "words", config())
    made["float"] = writer.save(folder / "float", config(), modules, tokenizers=words)
    modules["transformer"] = tiny_model.quantized(modules["transformer"])
    about = {"layout": 1, "method": "least-squares", "distilled": True, "activations": "bf16"}
    made["ternary"] = writer.save(folder / "ternary", config(), modules, tokenizers=words, quantization=about)
    scale = modules["transformer"].single_blocks.linear2.scale
    scale[...] = scale[...].at[1, 7].set(np.nan)
    parts = {"transformer": modules["transformer"]}
    made["damaged"] = writer.save(folder / "damaged", config(), parts, quantization=about)
    return made


def start(code: str, *argv: object, devices: int) -> subprocess.Popen:
    """A process with so many devices of the CPU, running `code`; its programs are compiled in haste, as of conftest's
    `hasty_compiler`, which would reach those for GPUs here, too."""
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, argv)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


ONE_PROCESS = """
import json, sys
import jax, numpy as np
from flux_jax.sampling import tensor_parallel
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.errors import UserError
from flux_jax.models.params import dotted
from flux_jax.sampling.pipeline import FluxPipeline
from flax import nnx

def mesh(**shape):
    return jax.make_mesh(tuple(shape.values()), tensor_parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)

def draw(folder, activations, mesh=None):
    pipe = FluxPipeline.from_pretrained(folder, mesh=mesh, activations=activations)
    return pipe, pipe(prompts, seed=[5, 9, 2], output_type="latent").images

prompts, models = map(json.loads, sys.argv[1:])
found, places = {}, mesh(data=2, model=4)
for kind, activations in (("float", None), ("ternary", "bf16"), ("ternary", "int8")):
    _, expected = draw(models[kind], activations)
    pipe, split = draw(models[kind], activations, places)
    found[f"{kind} {activations}"] = float(np.abs(split - expected).max() / np.abs(expected).max())
    if kind == "float":
        alone = draw(models[kind], activations, mesh(data=8, model=1))[1]
        found["data alone"] = float(np.abs(alone - expected).max())
try:
    tensor_parallel.load(Checkpoint.open(models["damaged"]), places)
except UserError as error:
    found["damaged"] = str(error)

Checkpoint.read = None  # that would bring whole weights to the host
for kind in ("float", "ternary"):
    transformer = tensor_parallel.load(Checkpoint.open(models[kind]), places)
    for path, leaf in nnx.to_flat_state(nnx.state(transformer)):
        name = dotted(tuple(word for word in path if word != "linear"))  # of a layer inside a parallel one
        wanted = jax.sharding.NamedSharding(places, tensor_parallel.partition_spec(name))
        assert leaf.sharding == wanted, (name, leaf.sharding)
        assert leaf.addressable_shards[0].data.shape == wanted.shard_shape(leaf.shape)
        matrix = "blocks" in name and leaf.ndim == 3
        assert leaf.sharding.is_fully_replicated != matrix or not matrix and name.endswith(("bias", "scale")), name
print(json.dumps(found))
"""


@pytest.mark.slow
def test_eight_devices_draw_what_one_draws(models, snapshot_message):
    named = json.dumps({kind: str(folder) for kind, folder in models.items()})
    found = json.loads(finish(start(ONE_PROCESS, json.dumps(PROMPTS), named, devices=8)))
    snapshot_message(found.pop("damaged"), "single_blocks.1.linear2")
    assert found.pop("data alone") == 0  # the same program on the same shapes: the same bits
    assert found.pop("ternary int8") < INT8_ROUNDING
    assert len(found) == 2
    assert all(difference < ROUNDING for difference in found.values()), found


ROWS = """
import jax, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from flux_jax.models.ternary import TernaryLinear
from flux_jax.sampling.tensor_parallel import RowParallelLinear

rng = np.random.default_rng(0)
codes, scale, bias = rng.integers(-1, 2, (24, 1024)).astype(np.int8), *rng.normal(size=(2, 24)).astype(np.float32)
whole = TernaryLinear.from_codes(codes, scale, bias, activations="int8")
x = rng.normal(size=(2, 5, 1024)).astype(np.float32) * np.repeat(np.float32([1, 0.1, 3, 0.02]), 256)[None, None]

def share(packed, scale, bias, x):
    return RowParallelLinear(TernaryLinear(packed, scale, bias, d_in=256, activations="int8"))(x)

mesh, columns = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,)), P(None, "model")
split = jax.shard_map(share, mesh=mesh, in_specs=(columns, P(), P(), P(None, None, "model")), out_specs=P(),
                      check_vma=False)
y, expected = jax.jit(split)(whole.packed[...], scale, bias, x), whole(x)
assert np.abs(y - expected).max() < 1e-6 * np.abs(expected).max(), np.abs(y - expected).max()
"""


def test_rows_of_int8_have_one_scale_over_all_devices():
    """Shards whose largest magnitudes differ by far: a scale of each one's own would show."""
    finish(start(ROWS, devices=4))


TWO_PROCESSES = """
import json, sys
import jax, numpy as np
from flux_jax.runtime import watchdog
from flux_jax.sampling import tensor_parallel
from flux_jax.sampling.pipeline import FluxPipeline

address, process, folder, prompts, out = sys.argv[1:]
process, prompts = int(process), json.loads(prompts)
watchdog.join(address, 2, process)
assert (jax.device_count(), jax.local_device_count()) == (4, 2)
from flux_jax.checkpoints.checkpoint import Checkpoint
stored = Checkpoint.open(folder)
mesh = tensor_parallel.make_mesh({"data": 2, "model": 2}, stored.config.transformer)
drawn = FluxPipeline.from_pretrained(folder, mesh=mesh)(prompts, seed=[5, 9, 2], output_type="latent").images
np.save(f"{out}-{process}.npy", drawn)

def read():
    return int(open("/proc/self/io").readline().split()[1])

quarters, before = tensor_parallel.make_mesh({"data": 1, "model": 4}, stored.config.transformer), read()
tensor_parallel.load(stored, quarters)
size = sum(file.stat().st_size for file in (stored.directory / "transformer").rglob("*") if file.is_file())
assert read() - before < 0.75 * size, (read() - before, size)  # its half, what all have, chunks at the edges
watchdog.leave()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_draw_what_one_device_draws(models, tmp_path):
    from flux_jax.sampling.pipeline import FluxPipeline

    address, folder = f"127.0.0.1:{free_port()}", models["float"]
    words = folder, json.dumps(PROMPTS), tmp_path / "drawn"
    processes = [start(TWO_PROCESSES, address, i, *words, devices=2) for i in range(2)]
    for process in processes:
        finish(process)
    expected = FluxPipeline.from_pretrained(folder)(PROMPTS, seed=[5, 9, 2], output_type="latent").images
    for i in range(2):
        drawn = np.load(tmp_path / f"drawn-{i}.npy")
        assert np.abs(drawn - expected).max() < ROUNDING * np.abs(expected).max()


@pytest.mark.parametrize("text", ["", "data", "data=0", "model=2,", "data=2,data=2", "rows=2", "data=2;model=2"])
def test_bad_meshes_are_one_sentence(text, snapshot_message):
    with snapshot_message.raises(UserError, "--mesh", text):
        arguments.parse_mesh(text)


def test_meshes(snapshot_message):
    assert arguments.parse_mesh("data=2,model=4") == {"data": 2, "model": 4}
    assert arguments.parse_mesh("model=4") == {"data": 1, "model": 4}
    with snapshot_message.raises(UserError, 1000, volatile="JAX finds .*"):
        tensor_parallel.make_mesh({"data": 1, "model": 1000}, TransformerConfig())
    with snapshot_message.raises(UserError, 24):
        tensor_parallel.check_heads(TransformerConfig(), 5)
    narrow = TransformerConfig(hidden_size=128, num_heads=2, axes_dim=(16, 24, 24))
    with snapshot_message.raises(UserError, 128):
        tensor_parallel.fused_sections(narrow, 2, "single_blocks.linear2.packed")


def test_jobs_of_one_call():
    base = {
        "id": None,
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "steps": 2,
        "guidance": 1.0,
        "true_cfg": 1.0,
    }
    base |= {"max_sequence_length": 12, "output": Path("a.png")}
    made = [requests.Request(i, prompt=str(i), seed=i, **base) for i in range(5)]
    made[3] = dataclasses.replace(made[3], steps=9)
    assert [[job.index for job in group] for group in requests.batches(made, 2)] == [[0, 1], [2], [3], [4]]
    assert all(len(group) == 1 for group in requests.batches(made, 1))


def command(*argv: object) -> str:
    return f"import sys; from flux_jax.cli.generate import main; sys.exit(main({[str(a) for a in argv]!r}))"


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_one_message(models, tmp_path, snapshot_message):
    """The second process is killed while the first waits for its share of a sum."""
    options = ["a red circle", "--seed", "1", "-m", models["float"], "--mesh", "model=2", "--steps", "1000"]
    options += ["--processes", "2", "--coordinator", f"127.0.0.1:{free_port()}", "--no-cache", "-o", tmp_path / "a.png"]
    first, second = (start(command(*options, "--process", i, "-v"), devices=1) for i in range(2))
    for line in second.stderr:  # the line that --verbose prints when the model is loaded
        if "compiled programs" in line:
            break
    second.send_signal(signal.SIGKILL)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 1, err
    assert ".png" not in out
    snapshot_message(err.splitlines()[-1])
    assert "Traceback" not in err
    assert not (tmp_path / "a.png").exists()
    second.communicate()


@pytest.mark.slow
def test_processes_write_once(models, tmp_path):
    options = [
        "a red circle",
        "-b",
        3,
        "--seed",
        4,
        "-m",
        models["float"],
        "--mesh",
        "data=2",
        "-o",
        tmp_path / "{seed}.png",
    ]
    options += ["--processes", 2, "--coordinator", f"127.0.0.1:{free_port()}", "--no-cache"]
    first, second = (start(command(*options, "--process", i), devices=1) for i in range(2))
    said = [finish(process).splitlines() for process in (first, second)]  # Gloo, for CPUs only, speaks on stdout, too
    assert [[Path(line).name for line in lines if line.endswith(".png")] for lines in said] == [
        ["4.png", "5.png", "6.png"],
        [],
    ]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.gpu
@pytest.mark.slow
def test_no_weight_is_gathered_on_four_h100():
    """The loop of FLUX.1-dev with ternary weights, compiled for four GPUs: sums of activations, and nothing else."""
    if not any(map(importlib.util.find_spec, aot.PLUGINS)):
        pytest.skip("needs the extra `aot`")
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from flux_jax.config import dev
    from flux_jax.models.quantize import abstract_ternary
    from flux_jax.sampling.programs import Conditions

    mesh = aot.mesh("h100", (1, 4), tensor_parallel.AXES)
    transformer = tensor_parallel.abstract(abstract_ternary(dev(), jnp.bfloat16), mesh)
    sampler = tensor_parallel.ShardedSampler(transformer, mesh)

    def array(*shape, dtype=jnp.float32, axes=("data",)):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    text, pooled = array(1, 1, 512, 4096, dtype=jnp.bfloat16), array(1, 1, 768, dtype=jnp.bfloat16)
    conditions = Conditions(text, pooled, array(1), array(1), array(1, 2, 4608, 64))
    sigmas = array(29, axes=())
    compiled = aot.compile_for(mesh, sampler.program, sampler.leaves, array(1, 4096, 64), sigmas, conditions)
    found = re.findall(r"= (.*) (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(.*", compiled.as_text())
    kinds = [kind for _, kind in found]
    assert set(kinds) == {"all-reduce", "all-gather"}
    assert kinds.count("all-gather") == 3  # modulations, once before the loop
    assert kinds.count("all-reduce") <= 5  # a double block's four, some joined into one, and a single block's
    assert all("u8[" not in shape for shape, _ in found)
    assert compiled.memory_analysis().argument_size_in_bytes < 3.2e9 / 3.4  # embedders and norms are whole everywhere
