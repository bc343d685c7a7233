"""The manifest of a checkpoint: what its one JSON file must hold before anything else of it is looked at.

In: a checkpoint's directory. Out: the manifest as a dict whose versions this package reads, and whose every entry that
is used has the type and the range that its users count on. `quantization` is null, or says of ternary weights
{"layout": version of the packed bytes, "method": how the codes were made, "distilled": whether they were trained to
paint, "activations": "bf16" or "int8", what they are meant to be multiplied with}, and whatever else their maker
records.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_jax.checkpoints.tree import AGAIN, leads_out
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError, shortened
from flux_jax.io.reading import read_object
from flux_jax.models.params import COMPONENTS
from pallas_kernels import LAYOUT_VERSION
from pallas_kernels.dispatch import ACTIVATIONS

MANIFEST = "flux_jax.json"
VERSION = 1  # of the format; raised when an older reader would misread a newer checkpoint
TOKENIZERS = "tokenizers"
DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "uint8")  # that a weight can have in a file
AXES, SIZE = 8, 2**48  # the most axes of a weight, and the most elements
OPTIONAL = {"name": str, "licence": str, "source": dict, "versions": dict}  # null, or not there, too


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `directory`, its versions and its form checked. UserError for any other."""
    path = directory / MANIFEST
    if os.access(directory, os.X_OK) and not os.path.lexists(path):
        diffusers = os.path.isfile(directory / "model_index.json")
        hint = ": it looks like a diffusers folder, run 'python -m convert' on it" if diffusers else ""
        raise UserError(f"{directory} is not a checkpoint of flux_jax (no {MANIFEST}){hint}")
    if leads_out(directory, path):
        raise UserError(f"{path} leads out of the checkpoint, which is refused")
    manifest = read_object(path, remedy=AGAIN)
    if "version" not in manifest:
        raise UserError(f"{path} is damaged: {AGAIN}")
    if type(version := manifest["version"]) is not int or version != VERSION:
        raise UserError(
            f"{path} has format version {shortened(version)}, this flux_jax reads version {VERSION}: upgrade flux_jax"
        )
    if missing := {"configs", "quantization", "tokenizers", "parts"} - manifest.keys():
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    _check_quantization(path, manifest["quantization"])
    for key, kind in OPTIONAL.items():
        if not isinstance(manifest.get(key), kind | None):
            raise UserError(f"{path} is damaged: {key} must be {kind.__name__} or null, not {shortened(manifest[key])}")
    components, tokenizers = manifest["parts"], manifest["tokenizers"]
    if not isinstance(components, dict) or not (tokenizers is None or isinstance(tokenizers, str)):
        raise UserError(f"{path} is damaged: parts must be an object, tokenizers a path or null")
    for component, entry in components.items():
        if component not in COMPONENTS:
            raise UserError(f"{path}: unknown part {shortened(component)}, must be of {', '.join(COMPONENTS)}")
        if not isinstance(entry, dict) or type(entry.get("path")) is not str or type(entry.get("weights")) is not dict:
            raise UserError(f"{path} is damaged: the {component} needs a path and a table of weights")
        for name, row in entry["weights"].items():
            if not _is_row(row):
                raise UserError(
                    f"{path} is damaged: {shortened(name)} of the {component} needs a dtype and a shape, "
                    f"not {shortened(row)}"
                )
    return manifest


def _is_row(row: Any) -> bool:
    """Whether an entry of a table of weights is [dtype, [lengths]], of an array that can be."""
    if not isinstance(row, list) or len(row) != 2 or row[0] not in DTYPES or not isinstance(row[1], list):
        return False
    size = 1
    for length in row[1]:
        if type(length) is not int or not 0 <= length <= SIZE:
            return False
        size *= max(1, length)
    return len(row[1]) <= AXES and size <= SIZE


def check_layers(directory: Path, manifest: Mapping[str, Any], config: FluxConfig) -> None:
    """UserError where a table has fewer weights than its component has layers: a number in `configs` is damaged, and no
    module should be built by it."""
    layers = {
        "transformer": config.transformer.num_double_blocks + config.transformer.num_single_blocks,
        "t5": config.t5.num_layers,
        "clip": config.clip.num_layers,
        "vae": len(config.vae.channels) * (2 * config.vae.layers_per_block + 1),
    }
    for component, entry in manifest["parts"].items():
        if (count := len(entry["weights"])) < layers[component]:
            raise UserError(
                f"{directory / MANIFEST} is damaged: it lists {count} weights of the {component}, whose configs ask "
                f"for {layers[component]} layers; {AGAIN}"
            )


def _check_quantization(path: Path, quantization: Any) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, dict) or "layout" not in quantization:
        raise UserError(f"{path} is damaged: quantization must be null or an object with a layout")
    if type(layout := quantization["layout"]) is not int or layout != LAYOUT_VERSION:
        raise UserError(
            f"{path} has weights packed in layout {shortened(layout)}, this flux_jax reads layout "
            f"{LAYOUT_VERSION}: upgrade flux_jax"
        )
    kinds = {"method": str, "distilled": bool, "activations": str}
    wrong = [name for name, kind in kinds.items() if type(quantization.get(name)) is not kind]
    if wrong or quantization["activations"] not in ACTIVATIONS:
        raise UserError(f"{path} is damaged: {', '.join(wrong) or 'activations'} of its quantization")


def with_activations(manifest: dict[str, Any], directory: Path, activations: str | None) -> dict[str, Any]:
    """The manifest with another choice of activations for its ternary weights; None: as it is. UserError for another
    kind than "bf16" and "int8", and for a manifest without ternary weights."""
    if activations is None:
        return manifest
    if manifest["quantization"] is None:
        raise UserError(f"{directory} has no ternary weights, and activations are chosen for these alone.")
    if activations not in ACTIVATIONS:
        raise UserError(f"activations must be {' or '.join(ACTIVATIONS)}, not {shortened(activations)}.")
    return {**manifest, "quantization": {**manifest["quantization"], "activations": activations}}


def lined_json(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of an object and lists kept on theirs, so that a weight is a line."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    inner = indent + "  "
    rows = ",\n".join(f"{inner}{json.dumps(key)}: {lined_json(item, inner)}" for key, item in value.items())
    return f"{{\n{rows}\n{indent}}}"
