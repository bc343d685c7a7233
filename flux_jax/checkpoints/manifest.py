"""The manifest of a checkpoint: what its one JSON file must hold before anything else of it is looked at.

In: a checkpoint's directory. Out: the manifest as a dict whose versions this package reads. `quantization` is null, or
says of ternary weights {"layout": version of the packed bytes, "method": how the codes were made, "distilled": whether
they were trained to paint, "activations": "bf16" or "int8", what they are meant to be multiplied with}, and whatever
else their maker records.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError
from flux_jax.models.params import COMPONENTS
from pallas_kernels import LAYOUT_VERSION
from pallas_kernels.dispatch import ACTIVATIONS

MANIFEST = "flux_jax.json"
VERSION = 1  # of the format; raised when an older reader would misread a newer checkpoint
TOKENIZERS = "tokenizers"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `directory`, its versions and its form checked. UserError for any other."""
    path = directory / MANIFEST
    if not path.is_file():
        diffusers = (directory / "model_index.json").is_file()
        hint = ": it looks like a diffusers folder, run 'python -m convert' on it" if diffusers else ""
        raise UserError(f"{directory} is not a checkpoint of flux_jax (no {MANIFEST}){hint}")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: copy or convert the checkpoint again") from None
    if version != VERSION:
        raise UserError(f"{path} has format version {version}, this flux_jax reads version {VERSION}: upgrade flux_jax")
    if missing := {"configs", "quantization", "tokenizers", "parts"} - manifest.keys():
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    _check_quantization(path, manifest["quantization"])
    components, tokenizers = manifest["parts"], manifest["tokenizers"]
    if not isinstance(components, dict) or not (tokenizers is None or isinstance(tokenizers, str)):
        raise UserError(f"{path} is damaged: parts must be an object, tokenizers a path or null")
    for component, entry in components.items():
        if component not in COMPONENTS:
            raise UserError(f"{path}: unknown part {component!r}, must be of {', '.join(COMPONENTS)}")
        if not isinstance(entry, dict) or type(entry.get("path")) is not str or type(entry.get("weights")) is not dict:
            raise UserError(f"{path} is damaged: the {component} needs a path and a table of weights")
    return manifest


def _check_quantization(path: Path, quantization: Any) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, dict) or "layout" not in quantization:
        raise UserError(f"{path} is damaged: quantization must be null or an object with a layout")
    if quantization["layout"] != LAYOUT_VERSION:
        raise UserError(
            f"{path} has weights packed in layout {quantization['layout']!r}, this flux_jax reads layout "
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
        raise UserError(f"activations must be {' or '.join(ACTIVATIONS)}, not {activations!r}.")
    return {**manifest, "quantization": {**manifest["quantization"], "activations": activations}}


def inside(directory: Path, relative: str) -> Path:
    """The absolute path of a folder of the checkpoint; UserError where it leads out, by its name or by a link."""
    root = directory.resolve()
    path = (root / relative).resolve()
    if Path(relative).is_absolute() or ".." in Path(relative).parts or not path.is_relative_to(root):
        raise UserError(f"{directory / MANIFEST}: the path {relative!r} leaves the checkpoint, which is refused")
    return path


def lined_json(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of an object and lists kept on theirs, so that a weight is a line."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    inner = indent + "  "
    rows = ",\n".join(f"{inner}{json.dumps(key)}: {lined_json(item, inner)}" for key, item in value.items())
    return f"{{\n{rows}\n{indent}}}"
