"""What every phase of a distillation shares: teacher, options, devices, and the run's folder.

In: a teacher's checkpoint, options, prompts, a mesh. Out: `RunContext`, whose `begin` refuses a folder of another run,
one that cannot be written and a disk too small, before anything is computed; `alone` keeps a second process out.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from flux_jax import validation
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.config import FluxConfig
from flux_jax.distill.options import Options
from flux_jax.errors import UserError, shortened
from flux_jax.io import atomic, locks, places, prompts, reading
from flux_jax.models.params import abstract_component, assemble
from flux_jax.models.transformer import Transformer
from flux_jax.runtime.environment import resolve_dtype
from flux_jax.sampling import schedule
from flux_jax.training import mesh as meshes
from flux_jax.training.loop import Trainer
from flux_jax.training.metrics import Metrics

RECORD = "run.json"
SPEED_ONLY = ("save_every", "log_every", "max_skipped")  # options that may change when a run goes on


@dataclasses.dataclass
class RunContext:
    """A run. `folder` holds all its files; training and held-out prompts are different ones, each once."""

    folder: Path
    teacher: Checkpoint
    options: Options
    mesh: Mesh
    training: list[str]
    held_out: list[str]

    @property
    def config(self) -> FluxConfig:
        return self.teacher.config

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.folder)

    def trainer(self, folder: Path, phase: str) -> Trainer:
        """The training loop of a phase, whose checkpoints are in `folder`."""
        o = self.options
        return Trainer(folder, phase, self.metrics, o.save_every, o.log_every, o.max_skipped)

    @cached_property
    def dtype(self) -> Any:
        """Of activations and of the teacher's weights."""
        return resolve_dtype(self.options.dtype)

    @property
    def steps(self) -> int:
        return self.options.steps or self.config.sampling.num_inference_steps

    @property
    def guidance(self) -> float:
        return self.config.sampling.guidance_scale if self.options.guidance < 0 else self.options.guidance

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        defaults, pixels = self.config.sampling, self.config.pixels_per_token
        return (self.options.height or defaults.height) // pixels, (self.options.width or defaults.width) // pixels

    @property
    def text_tokens(self) -> int:
        return self.config.sampling.max_sequence_length

    @cached_property
    def sigmas(self):
        """float32 [steps + 1]"""
        return schedule.sigmas(self.config.sampling, self.steps, self.grid[0] * self.grid[1])

    @cached_property
    def rope(self) -> jax.Array:
        table = schedule.rope_table(self.config.transformer, *self.grid, self.text_tokens)
        return meshes.put(table, meshes.whole(self.mesh))

    @property
    def blocks(self) -> list[str]:
        """Every block's name outside, in order: double_blocks.0, ..., single_blocks.0, ..."""
        shape = self.config.transformer
        doubles = [f"double_blocks.{i}" for i in range(shape.num_double_blocks)]
        return doubles + [f"single_blocks.{i}" for i in range(shape.num_single_blocks)]

    def load_teacher(self) -> Transformer:
        """The teacher's transformer, cut over the mesh."""
        module = self.teacher.load("transformer", self.dtype, lambda path, shape: meshes.parameter(self.mesh, shape))
        assert isinstance(module, Transformer)
        return module

    def block_names(self, block: str) -> dict[str, str]:
        """Name within the block -> the teacher's name of each of its weights."""
        return {
            name.removeprefix(f"{block}."): name
            for name in self.teacher.table("transformer")
            if name.startswith(f"{block}.")
        }

    def load_block(self, block: str, dtype: Any) -> nnx.Module:
        """One of the teacher's blocks; nothing else of it is read."""
        kind = block.split(".")[0]
        stacked = getattr(abstract_component("transformer", self.config), kind)
        one = nnx.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), stacked))
        names = self.block_names(block)

        def read(wanted: list[str]) -> dict[str, Any]:
            found = self.teacher.read("transformer", [names[name] for name in wanted])
            return {name: found[names[name]] for name in wanted}

        return assemble(one, read, dtype=dtype, sharding=lambda path, shape: meshes.parameter(self.mesh, shape))

    @cached_property
    def record(self) -> dict[str, Any]:
        """What tells this run from others: a folder holds one run's files alone."""
        return {
            "teacher": teacher_digest(self.teacher),
            "prompts": prompts.digest(self.training + self.held_out),
            "options": lasting(self.options.to_json()),
        }

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """`flux_jax.io.locks.alone`, for the leading process."""
        return locks.alone(self.folder) if jax.process_index() == 0 else contextlib.nullcontext()

    def begin(self) -> None:
        """Makes or takes up the folder. UserError where it cannot be used."""
        found = self.begun()
        if found is None:
            if self.folder.exists() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
                raise UserError(f"{self.folder} is no folder of a distillation, and not empty: choose another name.")
        elif found != self.record:
            options, before = self.record["options"], found.get("options")
            before = before if isinstance(before, dict) else {}
            which = [key for key in self.record if found.get(key) != self.record[key]]
            changed = [f'{k}="{shortened(before.get(k), quote=False)}"' for k in options if before.get(k) != options[k]]
            what = ", ".join(changed) or f"another {' and '.join(which)}"
            raise UserError(f"{self.folder} holds a run that was begun with {what}: give the same again, or delete it.")
        meshes.barrier("record read")
        if jax.process_index() == 0:
            there = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
            remedy = "free some space, or make fewer trajectories and block_points"
            places.check_space(self.folder, self.bytes_needed() - there, remedy)
            text = json.dumps(self.record, indent=1) + "\n"
            atomic.write_whole(self.folder / RECORD, text.encode(), overwrite=True)
        meshes.barrier("record written")

    def begun(self) -> dict[str, Any] | None:
        """The record in the folder; None where no run has begun. UserError where it cannot be read."""
        if not (self.folder / RECORD).exists():
            return None
        return reading.read_object(self.folder / RECORD, remedy=f"delete {self.folder} to begin anew")

    def check_size(self) -> None:
        """UserError for pictures, steps or a guidance that the model does not have."""
        defaults, options = self.config.sampling, self.options
        height, width = options.height or defaults.height, options.width or defaults.width
        validation.fit_size(self.config, height, width, strict=True)
        validation.check_numbers(
            self.config, steps=self.steps, guidance=self.guidance, true_cfg=1.0, max_sequence_length=self.text_tokens
        )

    def bytes_needed(self) -> int:
        """Disk that the whole run takes: trajectories, hidden states of two blocks, checkpoints, results."""
        shape, options = self.config.transformer, self.options
        tokens = self.grid[0] * self.grid[1]
        point = 4 * tokens * shape.in_channels
        text = 2 * (self.text_tokens * shape.text_dim + shape.pooled_dim)
        count = options.trajectories + options.held_out
        if "end_to_end" in options.phase_list:
            count += 2 * options.own_trajectories  # a round's rollouts go when the next round's are there
        total = count * (self.steps * point + text)
        weights = sum(math.prod(shape) for _, shape in self.teacher.table("transformer").values())
        if "blockwise" in options.phase_list:
            total += 4 * options.block_points * (tokens + self.text_tokens) * shape.hidden_size * self.dtype.itemsize
            total += 4 * weights + 3 * 16 * weights // max(1, len(self.blocks))
        if "end_to_end" in options.phase_list:
            total += 3 * 16 * weights  # Orbax keeps two checkpoints, and writes the third
        return total + weights


def lasting(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run keeps when it goes on."""
    return {name: value for name, value in options.items() if name not in SPEED_ONLY}


def teacher_digest(teacher: Checkpoint) -> str:
    """SHA-256 of what tells a teacher from others: the weights' hashes where the manifest has them, else all of it."""
    source = teacher.manifest.get("source") or {}
    if isinstance(source, dict) and source.get("sha256"):
        return hashlib.sha256(json.dumps(source["sha256"], sort_keys=True).encode()).hexdigest()
    return teacher.digest
