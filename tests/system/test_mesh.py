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

from flux_jax import aot, inputs, jobs, placement
from flux_jax.config import TransformerConfig
from flux_jax.errors import UserError
from flux_jax.quantize import quantize_transformer

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "a blue square", "two squares"]
ROUNDING = 2e-5  # of the final latents' largest value: sums of float32 in another order, through all steps


def config():
    """Heads for four devices, and enough of them in each for the tiles of ternary weights."""

    tiny = tiny_model.config()
    wide = dataclasses.replace(tiny.transformer, hidden_size=256, num_heads=8, axes_dim=(8, 12, 12))
    return dataclasses.replace(tiny, transformer=wide)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folder of a checkpoint with float32, and with ternary weights."""
    from flux_jax import checkpoint

    folder, made = tmp_path_factory.mktemp("models"), {}
    modules = tiny_model.modules(config())
    words = tiny_model.tokenizers(folder / "words", config())
    made["float"] = checkpoint.save(folder / "float", config(), modules, tokenizers=words)
    modules["transformer"] = quantize_transformer(modules["transformer"])
    about = {"layout": 1, "method": "least-squares", "distilled": True, "activations": "bf16"}
    made["ternary"] = checkpoint.save(folder / "ternary", config(), modules, tokenizers=words, quantization=about)
    return made


def start(code: str, *argv: object, devices: int) -> subprocess.Popen:
    """A process with so many devices of the CPU, running `code`."""
    environment = os.environ | {
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
import json, re, sys
import jax, numpy as np
from flux_jax import placement
from flux_jax.pipeline import FluxPipeline

prompts, models = json.loads(sys.argv[1]), json.loads(sys.argv[2])
call = dict(seed=[5, 9, 2], output_type="latent")
found = {}
for kind, folder in models.items():
    expected = FluxPipeline.from_pretrained(folder)(prompts, **call).images
    scale = np.abs(expected).max()
    for shape in ({"data": 2, "model": 4}, {"data": 8, "model": 1}):
        if kind == "ternary":
            shape = {"data": 4, "model": 2}
        mesh = jax.make_mesh(tuple(shape.values()), placement.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
        pipe = FluxPipeline.from_pretrained(folder, mesh=mesh)
        drawn = pipe(prompts, **call).images
        linear = pipe.transformer.single_blocks.linear1
        weight = linear.weight[...] if hasattr(linear, "weight") else linear.packed[...]
        shard = weight.addressable_shards[0].data.shape
        assert shard[1] * shape["model"] == weight.shape[1], (shard, weight.shape)
        found[f"{kind} {shape}"] = float(np.abs(drawn - expected).max() / scale)
        if kind == "ternary":
            break
print(json.dumps(found))
"""


def test_eight_devices_draw_what_one_draws(models):
    named = json.dumps({kind: str(folder) for kind, folder in models.items()})
    found = json.loads(finish(start(ONE_PROCESS, json.dumps(PROMPTS), named, devices=8)))
    assert len(found) == 3
    assert all(difference < ROUNDING for difference in found.values()), found
    assert found["float {'data': 8, 'model': 1}"] == 0  # the same program on the same shapes: the same bits


TWO_PROCESSES = """
import json, sys
import jax, numpy as np
from flux_jax import lifeline, placement
from flux_jax.pipeline import FluxPipeline

address, process, folder, prompts, out = sys.argv[1:]
process, prompts = int(process), json.loads(prompts)
placement.join(address, 2, process)
assert (jax.device_count(), jax.local_device_count()) == (4, 2)
from flux_jax.checkpoint import Checkpoint
mesh = placement.make_mesh({"data": 2, "model": 2}, Checkpoint.open(folder).config.transformer)
drawn = FluxPipeline.from_pretrained(folder, mesh=mesh)(prompts, seed=[5, 9, 2], output_type="latent").images
np.save(f"{out}-{process}.npy", drawn)
lifeline.leave()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_draw_what_one_device_draws(models, tmp_path):
    from flux_jax.pipeline import FluxPipeline

    address, folder = f"127.0.0.1:{free_port()}", models["float"]
    arguments = folder, json.dumps(PROMPTS), tmp_path / "drawn"
    processes = [start(TWO_PROCESSES, address, i, *arguments, devices=2) for i in range(2)]
    for process in processes:
        finish(process)
    expected = FluxPipeline.from_pretrained(folder)(PROMPTS, seed=[5, 9, 2], output_type="latent").images
    for i in range(2):
        drawn = np.load(tmp_path / f"drawn-{i}.npy")
        assert np.abs(drawn - expected).max() < ROUNDING * np.abs(expected).max()


@pytest.mark.parametrize("text", ["", "data", "data=0", "model=2,", "data=2,data=2", "rows=2", "data=2;model=2"])
def test_bad_meshes_are_one_sentence(text):
    with pytest.raises(UserError, match="--mesh must read data=N,model=M"):
        inputs.parse_mesh(text)


def test_meshes():
    assert inputs.parse_mesh("data=2,model=4") == {"data": 2, "model": 4}
    assert inputs.parse_mesh("model=4") == {"data": 1, "model": 4}
    with pytest.raises(UserError, match="has 1000 places and JAX finds"):
        placement.make_mesh({"data": 1, "model": 1000}, TransformerConfig())
    with pytest.raises(UserError, match="does not divide the transformer's 24 heads"):
        placement.check_heads(TransformerConfig(), 5)
    with pytest.raises(UserError, match="tiles of 128"):
        placement.arrange(
            TransformerConfig(hidden_size=128, num_heads=2, axes_dim=(16, 24, 24)), 2,
            "single_blocks.0.linear2.packed", np.zeros((128, 160), np.uint8),
        )  # fmt: skip


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
    made = [jobs.Job(i, prompt=str(i), seed=i, **base) for i in range(5)]
    made[3] = dataclasses.replace(made[3], steps=9)
    assert [[job.index for job in group] for group in jobs.alike(made, 2)] == [[0, 1], [2], [3], [4]]
    assert all(len(group) == 1 for group in jobs.alike(made, 1))


def command(*argv: object) -> str:
    return f"import sys; from flux_jax.generate import main; sys.exit(main({[str(a) for a in argv]!r}))"


def test_a_killed_process_ends_the_others_with_one_message(models, tmp_path):
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
    assert out == ""
    assert "Another process of this run has stopped" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "a.png").exists()
    second.communicate()


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


def test_no_weight_is_gathered_on_four_h100():
    """The loop of FLUX.1-dev with ternary weights, compiled for four GPUs: sums of activations, and nothing else."""
    if not any(map(importlib.util.find_spec, aot.PLUGINS)):
        pytest.skip("needs the extra `aot`")
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from flux_jax.config import dev
    from flux_jax.denoise import Conditions
    from flux_jax.quantize import abstract_ternary

    mesh = aot.mesh("h100", (1, 4), placement.AXES)
    spread = placement.Spread(placement.abstract(abstract_ternary(dev(), jnp.bfloat16), mesh), mesh)

    def array(*shape, dtype=jnp.float32, axes=("data",)):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    text, pooled = array(1, 1, 512, 4096, dtype=jnp.bfloat16), array(1, 1, 768, dtype=jnp.bfloat16)
    conditions = Conditions(text, pooled, array(1), array(1), array(1, 2, 4608, 64))
    sigmas = array(29, axes=())
    compiled = aot.compile_for(mesh, spread.denoise, spread.leaves, array(1, 4096, 64), sigmas, conditions)
    found = re.findall(r"= (.*) (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(.*", compiled.as_text())
    kinds = [kind for _, kind in found]
    assert set(kinds) == {"all-reduce", "all-gather"}
    assert kinds.count("all-gather") == 3  # modulations, once before the loop
    assert kinds.count("all-reduce") <= 5  # a double block's four, some joined into one, and a single block's
    assert all("u8[" not in shape for shape, _ in found)
    assert compiled.memory_analysis().argument_size_in_bytes < 3.2e9 / 3.4  # embedders and norms are whole everywhere
