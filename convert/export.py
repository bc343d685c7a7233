"""A checkpoint written back as a diffusers folder, which diffusers' FluxPipeline.from_pretrained loads.

In: a checkpoint, a folder name. Out: model_index.json, scheduler/, tokenizers, and per component a config.json and one
.safetensors file with the published names, in the checkpoint's dtype. Weights go through one at a time. Ternary weights
are multiplied out, codes * scale, since diffusers has no place for packed ones: it then computes what this package
does with activations in full precision, up to the rounding of the products to the checkpoint's dtype.
"""

import json
import math
import shutil
import sys
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
from flux_jax.io.atomic import WholeFolder, cannot_write
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
    """Writes the folder `out`, whole or not at all. UserError where it exists or the checkpoint lacks a component."""
    checkpoint = Checkpoint.open(name)
    if missing := COMPONENTS.keys() - set(checkpoint.components):
        raise UserError(f"{checkpoint.directory} has no {', '.join(sorted(missing))}: diffusers needs every part")
    with WholeFolder(out) as folder:
        try:
            _write_small(checkpoint, folder.working)
            for component, name in configs.FOLDERS.items():
                _write_component(checkpoint, component, folder.working / name / WEIGHTS[component], quiet)
        except OSError as error:
            raise cannot_write(out, error) from error
        folder.publish()


def _write_small(checkpoint: Checkpoint, working: Path) -> None:
    config = checkpoint.config
    extra = {
        "name": config.name,
        "licence": checkpoint.manifest.get("licence"),
        "sampling": config.to_json()["sampling"],
    }
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0", configs.EXTRA: extra, **CLASSES}
    _write_json(working / "model_index.json", index)
    _write_json(working / "scheduler" / "scheduler_config.json", configs.scheduler_json(config.sampling))
    for component, folder in configs.FOLDERS.items():
        _write_json(working / folder / "config.json", configs.published(component, config))
    for component, (folder, _) in TOKENIZER_FOLDERS.items():
        shutil.copytree(checkpoint.tokenizers / component, working / folder)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


def _write_component(checkpoint: Checkpoint, component: str, file: Path, quiet: bool) -> None:
    """One safetensors file: header first, all shapes being known, then each weight's pieces in that order."""
    from tqdm import tqdm

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
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    with (
        open(file, "wb") as f,
        tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, desc=component, disable=quiet) as bar,
    ):
        f.write(file_header(tensors, {"format": "pt"}))
        for path, value in dense_stream(checkpoint, component, weights):
            for piece in _pieces(weights[path], value):
                f.write(memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8)))
                bar.update(piece.nbytes)


def _pieces(weight: Weight, value: np.ndarray) -> list[np.ndarray]:
    if weight.change == "swap":
        value = np.concatenate(np.split(value, 2)[::-1])
    return [value[piece.start : piece.stop] for piece in weight.pieces]
