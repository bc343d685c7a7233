"""A checkpoint written back as a diffusers folder, which diffusers' FluxPipeline.from_pretrained loads.

In: a checkpoint, a folder name. Out: model_index.json, scheduler/, tokenizers, and per component a config.json and one
.safetensors file with the published names, in the checkpoint's dtype. Weights go through one at a time. Ternary weights
are multiplied out, codes * scale, since diffusers has no place for packed ones: it then computes what this package
does with activations in full precision, up to the rounding of the products to the checkpoint's dtype.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import configs
from convert.engine import Weight, expected
from convert.rules import FORMATS
from convert.sources import TOKENIZER_FOLDERS
from convert.weight_format import dense_stream, dense_table
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.errors import UserError
from flux_jax.io import published
from flux_jax.io.atomic import WholeFolder
from flux_jax.io.places import check_space
from flux_jax.io.safetensors import FLOATS, file_header
from flux_jax.models.params import COMPONENTS, abstract_component, leaf_table

CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "t5": "model.safetensors",
    "clip": "model.safetensors",
}
STORED = set(map(np.dtype, FLOATS.values()))


def export(name: str | Path, out: Path, *, quiet: bool = False) -> None:
    """Writes the folder `out`, whole or not at all. UserError where it exists, the disk is too small, or the checkpoint
    lacks a component or a weight of one."""
    checkpoint = Checkpoint.open(name)
    if missing := COMPONENTS.keys() - set(checkpoint.components):
        raise UserError(f"{checkpoint.directory} has no {', '.join(sorted(missing))}: diffusers needs every part")
    plans = {component: _plan(checkpoint, component) for component in configs.FOLDERS}
    small = _small(checkpoint)
    with WholeFolder(out) as folder:
        check_space(out, sum(plan.nbytes for plan in plans.values()))
        for path, data in small.items():
            _write_json(folder.working / path, data)
        for component, (place, _) in TOKENIZER_FOLDERS.items():
            (folder.working / place).mkdir()
            published.copy_tokenizer(checkpoint.tokenizers / component, folder.working / place)
        for component, plan in plans.items():
            _write_component(checkpoint, component, plan, folder.working, quiet)
        folder.publish()


@dataclass(frozen=True)
class Plan:
    """What becomes of a component: our weights with their pieces, and dtype and shape of each tensor of the file."""

    weights: dict[str, Weight]
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())


def _plan(checkpoint: Checkpoint, component: str) -> Plan:
    fmt, table = FORMATS[component][0], dense_table(checkpoint, component)
    weights = expected(component, fmt, checkpoint.config, leaf_table(abstract_component(component, checkpoint.config)))
    tensors = {}
    for path, weight in weights.items():
        dtype, shape = table.get(path, (None, None))
        if dtype not in STORED or shape != weight.shape:
            raise UserError(
                f"{checkpoint.directory}: {path} of the {component} is missing, or not of shape {list(weight.shape)}"
            )
        tensors |= {fmt.prefixes[0] + piece.name: (dtype, piece.shape) for piece in weight.pieces}
    return Plan(weights, tensors)


def _small(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The JSON files by their paths."""
    config = checkpoint.config
    extra = {
        "name": config.name,
        "licence": checkpoint.manifest.get("licence"),
        "sampling": config.to_json()["sampling"],
    }
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0", configs.EXTRA: extra, **CLASSES}
    return {
        "model_index.json": index,
        "scheduler/scheduler_config.json": configs.scheduler_json(config.sampling),
        **{f"{place}/config.json": configs.published(each, config) for each, place in configs.FOLDERS.items()},
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


def _write_component(checkpoint: Checkpoint, component: str, plan: Plan, working: Path, quiet: bool) -> None:
    """One safetensors file: header first, all shapes being known, then each weight's pieces in that order."""
    from tqdm import tqdm

    with (
        open(working / configs.FOLDERS[component] / WEIGHTS[component], "wb") as f,
        tqdm(total=plan.nbytes, unit="B", unit_scale=True, file=sys.stderr, desc=component, disable=quiet) as bar,
    ):
        f.write(file_header(plan.tensors, {"format": "pt"}))
        for path, value in dense_stream(checkpoint, component, plan.weights):
            for piece in _pieces(plan.weights[path], value):
                f.write(memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8)))
                bar.update(piece.nbytes)


def _pieces(weight: Weight, value: np.ndarray) -> list[np.ndarray]:
    if weight.change == "swap":
        value = np.concatenate(np.split(value, 2)[::-1])
    return [value[piece.start : piece.stop] for piece in weight.pieces]
