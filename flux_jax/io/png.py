"""Pictures on disk: PNG files that carry what it takes to make them again, written whole or not at all.

In: pixels uint8 [h, w, 3] and a record (a JSON object). Out: a PNG with two text chunks: `parameters`, one paragraph
as the web interfaces for diffusion models write it, and `flux_jax`, the record itself. No array library but numpy
here, so that reading a record starts quickly.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from flux_jax.errors import UserError
from flux_jax.io.atomic import write_whole

RECORD_FORMAT = 1
RECORD_KEY = "flux_jax"


def to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """uint8 [b, h, w, 3] as a list of b pictures."""
    return [Image.fromarray(image) for image in pixels]


def parameters_text(record: dict[str, Any]) -> str:
    """The record as the paragraph that other tools read: prompt, negative prompt, then `Key: value` pairs."""
    model = record["model"]
    lines = [record["prompt"]]
    if record.get("negative_prompt") is not None:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    pairs = {
        "Steps": record["steps"],
        "Sampler": "Euler",
        "CFG scale": record["true_cfg"],
        "Distilled CFG Scale": record["guidance"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": model["sha256"][:10],
        "Model": model["name"],
        "Version": f"flux_jax {record['versions']['flux_jax']}",
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in pairs.items())])


def write_png(path: Path, image: Image.Image, record: dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes image and record at once. Raises UserError if `path` exists (unless `overwrite`) or cannot be written."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", parameters_text(record))
    info.add_itxt(RECORD_KEY, json.dumps(record, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=info)
    write_whole(path, buffer.getvalue(), overwrite=overwrite)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a PNG made by this project, or of a JSON file that holds one. UserError if there is none."""
    try:
        if path.suffix.lower() == ".json":
            text = path.read_text("utf-8")
        else:
            with Image.open(path) as image:
                text = getattr(image, "text", {}).get(RECORD_KEY)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a readable picture"
        raise UserError(f"Cannot read {path}: {reason}.") from error
    if text is None:
        raise UserError(f"{path} holds no record of how it was made; only PNG files written by flux_jax do.")
    return check_record(text, path)


def check_record(text: str, path: Path) -> dict[str, Any]:
    """Parses a record and checks the type of each field that generation relies on."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"The record in {path} is not valid JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise UserError(f"The record in {path} has format {found!r}; this version reads format {RECORD_FORMAT}.")
    types: dict[str, tuple[type, ...]] = {
        "prompt": (str,),
        "negative_prompt": (str, type(None)),
        "seed": (int,),
        "steps": (int,),
        "guidance": (int, float),
        "true_cfg": (int, float),
        "width": (int,),
        "height": (int,),
        "max_sequence_length": (int,),
        "dtype": (str,),
        "model": (dict,),
    }
    if faults := [key for key, kinds in types.items() if not isinstance(record.get(key), kinds)]:
        raise UserError(f"The record in {path} lacks, or has the wrong type in: {', '.join(faults)}.")
    return record
