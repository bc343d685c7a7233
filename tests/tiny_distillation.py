"""A distillation so small that it runs in seconds: teacher, prompts, options, and processes that die when told."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import tiny_model

from flux_jax.checkpoints import writer
from flux_jax.config import FluxConfig
from flux_jax.distill.options import Options

ROOT = Path(__file__).parents[1]
PROMPTS = [f"{n} {a} {shape} and {m} {b} {other}" for n in ("a", "two") for m in ("a", "three") for a in ("red", "blue")
           for b in ("green", "red") for shape in ("circle", "square") for other in ("triangle", "circle")]  # fmt: skip
OPTIONS = Options(
    trajectories=8, held_out=4, block_steps=4, block_points=12, block_batch=4, learning_steps=6, batch=4,
    settle_steps=3, own_trajectories=4, save_every=2, log_every=2, products="float32",
)  # fmt: skip


def config() -> FluxConfig:
    base = tiny_model.config()
    return dataclasses.replace(base, transformer=dataclasses.replace(base.transformer, num_single_blocks=1))


def teacher(folder: Path) -> Path:
    """A bf16 checkpoint, so that what the student stores is coarser than what it trains."""
    made = config()
    modules = {
        part: jax.tree.map(lambda x: x.astype(jnp.bfloat16), module)
        for part, module in tiny_model.modules(made).items()
    }
    words = tiny_model.tokenizers(folder / "words", made)
    source = {"from": "a test", "sha256": {"transformer": "0"}}
    return writer.save(folder / "teacher", made, modules, tokenizers=words, licence="Apache-2.0", source=source)


def prompts_file(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def flags(options: Options) -> list[str]:
    """The command line that gives these options."""
    words = []
    for field in dataclasses.fields(options):
        name, value = field.name.replace("_", "-"), getattr(options, field.name)
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


DYING = """
import itertools, os, signal, sys
from flux_jax.distill import store, training

where, count = sys.argv[1], int(sys.argv[2])
calls = itertools.count(1)

def dying(function, counts=lambda *args: True):
    def wrapped(*args, **options):
        if counts(*args) and next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return wrapped

if where == "store":
    store.save = dying(store.save)
elif where == "step":
    training.update = dying(training.update)
elif where == "orbax":  # everything is written, the name is not given yet
    os.rename = dying(os.rename, lambda source, *_: "/checkpoints/" in str(source))
from flux_jax.distill.__main__ import main
sys.exit(main(sys.argv[3:]))
"""


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with so many CPU devices, and with the strictness of these tests."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }


def run(words: list[str], die: tuple[str, int] = ("nowhere", 0), devices: int = 1) -> subprocess.CompletedProcess:
    """The command line in a process of its own, killed by SIGKILL at the named place's call number die[1]."""
    command = [sys.executable, "-c", DYING, die[0], str(die[1]), *words]
    return subprocess.run(command, env=environment(devices), capture_output=True, text=True, check=False, timeout=900)
