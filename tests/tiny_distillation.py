"""A distillation so small that it runs in seconds: teacher, prompts, options, and runs that die when told."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import tiny_model

from flux_jax.checkpoints import writer
from flux_jax.config import FluxConfig
from flux_jax.distill.options import Options
from flux_jax.io import atomic
from flux_jax.training import mesh
from flux_jax.training.loop import Trainer

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


class Killed(BaseException):
    """Stands for a kill, where a test's own process is to go on."""


def raise_killed() -> NoReturn:
    raise Killed


def die_at(place: list, die: Callable[[], Any] = raise_killed, patch: Callable[..., None] = setattr) -> None:
    """Makes `die` be called at a place:

    ["step", phase, n]    before step n of a phase
    ["publish", name]     a store whose path ends so is written, but has not got its name
    ["barrier", name]     where processes wait for one another: a store of this name is written, or to be removed
    ["rename", name]      Orbax has written a checkpoint whose path ends so, but it has not got its name
    """
    kind, *where = place
    if kind == "step":
        run = Trainer.run

        def run_dying(self, state, update, *rest):
            def step(state, batch, number):
                if [self.phase, int(number)] == where:
                    die()
                return update(state, batch, number)

            return run(self, state, step, *rest)

        patch(Trainer, "run", run_dying)
        return
    owner, named = {
        "publish": (atomic.WholeFolder, lambda whole: whole.folder),
        "barrier": (mesh, lambda name: name),
        "rename": (os, lambda _, target: target),
    }[kind]
    function = getattr(owner, kind)

    def dying(*args, **options):
        if str(named(*args)).endswith(where[0]):
            die()
        return function(*args, **options)

    patch(owner, kind, dying)


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with so many CPU devices, and with the strictness of these tests."""
    return os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }


DYING = "import sys, tiny_distillation; sys.exit(tiny_distillation.main(*sys.argv[1:]))"


def main(place: str, *words: str) -> int:
    """In a process of its own: the command line, until SIGKILL at the place, if there is one (JSON)."""
    from flux_jax.cli import distill

    if where := json.loads(place):
        die_at(where, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return distill.main(words)


def start(words: list[str], place: list | None = None) -> subprocess.Popen:
    """The command line in a process of its own, killed by SIGKILL at the place."""
    command = [sys.executable, "-c", DYING, json.dumps(place), *words]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
