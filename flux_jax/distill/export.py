"""The finished student as a checkpoint: codes packed to two bits, scales, and how they were made.

In: the student's parameters and the teacher's checkpoint. Out: a checkpoint directory whose transformer computes what
the student computed; every other component and the tokenizers are the teacher's, byte for byte; `training/` has the
run's metrics, curve and options.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flux_jax.checkpoints.writer import CheckpointWriter
from flux_jax.distill import student
from flux_jax.distill.run_context import RunContext
from flux_jax.models.params import dotted, layer_names
from flux_jax.training import mesh as meshes
from pallas_kernels import LAYOUT_VERSION, pack_ternary


def round_to_storage(work: RunContext, params: Any) -> Any:
    """The parameters with every float that stays rounded to the dtype that the teacher stores it in."""
    table = work.teacher.table("transformer")

    def cast(path, x):
        if path[-1].key in ("shadow", "log_scale"):
            return x
        name = ".".join(key.key for key in path)
        stored = table[name if name in table else (layer_names(name, 1) or [name])[0]][0]
        return x.astype(stored).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def stacked_leaves(work: RunContext, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of the student's transformer as it is stored, one stacked leaf at a time from the devices."""
    table = work.teacher.table("transformer")
    flat = dict(nnx.to_flat_state(nnx.State(params)))
    for path, leaf in flat.items():
        name, last = dotted(path[:-1]), path[-1]
        if last == "log_scale":
            continue
        if last == "shadow":
            whole = meshes.fetch((leaf, flat[(*path[:-1], "log_scale")]))
            codes, scale = student.finalize(*map(jnp.asarray, whole))
            yield f"{name}.packed", np.asarray(pack_ternary(np.asarray(codes)))
            yield f"{name}.scale", np.asarray(scale, np.float32)
        else:
            value = np.asarray(meshes.fetch(leaf))
            full = f"{name}.{last}" if name else str(last)
            stored = table[full if full in table else (layer_names(full, 1) or [full])[0]][0]
            yield full, np.asarray(value.astype(stored))


def training_files(work: RunContext) -> dict[str, bytes]:
    """What tells how the student was made, by name in its checkpoint; no weight depends on it."""
    paths = [path for path in (work.metrics.path, work.metrics.curve) if path.exists()]
    files = {path.name: path.read_bytes() for path in paths}
    files["options.json"] = (json.dumps(work.options.to_json(), indent=1) + "\n").encode()
    return {f"training/{name}": content for name, content in files.items()}


def export(work: RunContext, params: Any, out: Path, about: Mapping[str, Any], overwrite: bool) -> None:
    """Writes the checkpoint: whole, or not at all; of a run with one process. about: further entries of the manifest's
    `quantization`."""
    quantization = {
        "layout": LAYOUT_VERSION,
        "method": work.options.method,
        "distilled": bool(work.options.phase_list),
        "activations": work.options.activations,
    } | dict(about)
    manifest = work.teacher.manifest
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        for name, value in stacked_leaves(work, params):
            layers = layer_names(name, len(value))
            for each, array in [(name, value)] if layers is None else zip(layers, value, strict=True):
                writer.add("transformer", each, array)
        for component in work.teacher.components:
            if component != "transformer":
                for name, value in work.teacher.stream(component, work.teacher.table(component)):
                    writer.add(component, name, value)
        writer.finish(
            work.config,
            tokenizers=work.teacher.tokenizers,
            quantization=quantization,
            source=manifest.get("source"),
            licence=manifest.get("licence"),
            files=training_files(work),
        )
