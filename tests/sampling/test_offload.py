"""`--offload`: the same pictures with most weights on the host, at most what works on the device."""

import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.config import T5Config
from flux_jax.errors import UserError
from flux_jax.models.t5 import T5Encoder
from flux_jax.runtime import memory
from flux_jax.sampling import executor
from flux_jax.sampling.offload import encode_by_layers, host
from flux_jax.sampling.pipeline import FluxPipeline

ROOT = Path(__file__).parents[2]


def test_layer_by_layer_is_the_same_text():
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, num_heads=2, head_dim=16, num_layers=3, max_distance=16)
    t5 = tiny_model.filled(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))), np.random.default_rng(0))
    ids = [np.random.default_rng(i).integers(0, 64, (1, 12)).astype(np.int32) for i in range(2)]
    layered = encode_by_layers(t5, ids, host())
    for text, each in zip(layered, ids, strict=True):
        np.testing.assert_allclose(text, jax.jit(T5Encoder.__call__)(t5, each), atol=2e-6)
    assert np.abs(layered[0] - layered[1]).max() > 0.1


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    config = tiny_model.config()
    words = tiny_model.tokenizers(tmp_path_factory.mktemp("tokenizers"), config)
    return {"config": config, "tokenizers": Tokenizers.load(words, config), **tiny_model.modules(config)}


def draw(arguments, **options):
    return FluxPipeline(**arguments, **options)(["a red circle", "a square"], seed=7, output_type="np").images


def test_offloaded_pipelines_draw_the_same(arguments):
    expected = draw(arguments)
    np.testing.assert_array_equal(draw(arguments, offload="model"), expected)
    np.testing.assert_allclose(draw(arguments, offload="layers", vae_tiling="on"), expected, atol=1e-4)


def test_auto_tiling_follows_the_free_memory(arguments, monkeypatch):
    seen, decode = [], executor.programs.decode

    class Spy:
        def lower(self, *args, strip_bytes, **sizes):
            seen.append(strip_bytes)
            return decode.lower(*args, strip_bytes=strip_bytes, **sizes)

    monkeypatch.setattr(executor.programs, "decode", Spy())
    for free, strips in ((10**12, None), (1, executor.STRIP_BYTES), (None, None)):
        answers = itertools.chain([free], itertools.repeat(10**12))  # first, whole pictures are asked about
        monkeypatch.setattr(memory, "free", lambda device, answers=answers: next(answers))
        executor.StageExecutor().decode(arguments["vae"], [jnp.zeros((8, 64))], 2, 4)
        assert seen[-1] == strips


@pytest.mark.parametrize(
    ("stage", "remedy"),
    [("encode", 'offload="layers"'), ("denoise", 'offload="model" or a ternary'), ("decode", 'vae_tiling="on"')],
)
def test_out_of_memory_names_the_stage_and_the_remedy(arguments, monkeypatch, stage, remedy, snapshot_message):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(executor.programs, stage, exhausted)
    with snapshot_message.raises(UserError, stage[:-1], remedy) as error:
        draw(arguments, vae_tiling="off")
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)


PEAKS = """
import gc, jax, numpy as np, sys
sys.path[:0] = [{tests!r}]
import tiny_model
from pathlib import Path
from flux_jax.sampling import executor, offload
from flux_jax.sampling.pipeline import FluxPipeline

host, device = jax.devices()
jax.config.update("jax_default_device", device)
config = tiny_model.config()
modules = {{k: jax.device_put(m, host) for k, m in tiny_model.modules(config).items()}}
size = {{k: sum(x.nbytes for x in jax.tree.leaves(m)) for k, m in modules.items()}}
size["layer"] = max(x.nbytes for x in jax.tree.leaves(modules["t5"].layers))
layer_bytes = sum(x.nbytes for x in jax.tree.leaves(modules["t5"].layers)) // config.t5.num_layers
words = tiny_model.tokenizers(Path({folder!r}), config)
from flux_jax.checkpoints.tokenizers import Tokenizers
peaks = {{}}

def held():
    return sum(x.nbytes for x in jax.live_arrays() if x.devices() == {{device}})

def watch(name, function):
    def watched(*args, **static):
        peaks[name] = max(peaks.get(name, 0), held() - before)
        return function(*args, **static)
    return watched  # without `lower`: the executor calls it, and not what it compiled

for name in ("denoise", "decode", "pool"):
    setattr(executor.programs, name, watch(name, getattr(executor.programs, name)))
offload.layer = watch("layer", offload.layer)
gc.collect()  # what making the modules left on the device would be missed from the peaks
before = held()
pipe = FluxPipeline(config, tokenizers=Tokenizers.load(words, config), offload="layers", vae_tiling="off", **modules)
out = pipe("a red circle", seed=1)
slack = 60_000  # activations and tables
for stage, part in (("denoise", "transformer"), ("decode", "vae"), ("pool", "clip")):
    assert size[part] <= peaks[stage] <= size[part] + slack, (stage, peaks, size)
assert layer_bytes <= peaks["layer"] <= layer_bytes + slack, (peaks, layer_bytes)
assert held() - before < slack, held() - before
assert size["transformer"] > 2 * slack and size["t5"] + size["vae"] > slack
print("peaks", peaks, size)
"""


@pytest.mark.slow
def test_only_what_works_is_on_the_device(tmp_path):
    """Two devices of the CPU stand for the host and the GPU."""
    code = PEAKS.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "words"))
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
