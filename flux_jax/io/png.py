"""Pictures on disk: PNG files that carry what it takes to make them again, written whole or not at all.

In: pixels uint8 [h, w, 3] and a `Record`. Out: a PNG with two text chunks: `parameters`, one paragraph as the web
interfaces for diffusion models write it, and `flux_jax`, the record itself as a JSON object. No array library but numpy
here, so that reading a record starts quickly.
"""

import io
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from flux_jax.errors import UserError
from flux_jax.io.atomic import write_whole
from flux_jax.io.fields import Types, check_fields

RECORD_FORMAT = 1
RECORD_KEY = "flux_jax"
NEEDED: Types = {  # what generation relies on in a record that it reads; faults are reported in this order
    "prompt": str,
    "negative_prompt": str | None,
    "seed": int,
    "steps": int,
    "guidance": int | float,
    "true_cfg": int | float,
    "width": int,
    "height": int,
    "max_sequence_length": int,
    "dtype": str,
    "model": dict,
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """How a picture was made; the fields stand in the order of its JSON object. `model`: id (what it was called by),
    name, sha256 of its manifest, options; `versions`: of flux_jax, jax and python."""

    dtype: str
    model: dict[str, Any]
    device: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    prompt: str
    negative_prompt: str | None = None
    seed: int
    height: int
    width: int
    steps: int
    guidance: int | float
    true_cfg: int | float
    max_sequence_length: int

    def to_json(self) -> dict[str, Any]:
        return {"format": RECORD_FORMAT} | vars(self)

    @classmethod
    def from_json(cls, data: Any, where: str) -> "Record":
        """The record in what `json.loads` gave; keys that it does not know are left out. UserError, which begins with
        `where`, if it is another format, or a field that generation relies on is not there or of a wrong type."""
        found = data.get("format") if isinstance(data, dict) else None
        if found != RECORD_FORMAT:
            raise UserError(f"{where} has format {found!r}; this version reads format {RECORD_FORMAT}.")
        check_fields(data, NEEDED, where)
        return cls(**{each.name: data[each.name] for each in fields(cls) if each.name in data})


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


def write_png(path: Path, image: Image.Image, record: Record | dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes image and record (or its JSON object) at once. Raises UserError if `path` exists (unless `overwrite`) or
    cannot be written."""
    entry = record.to_json() if isinstance(record, Record) else record
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", parameters_text(entry))
    info.add_itxt(RECORD_KEY, json.dumps(entry, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=info)
    write_whole(path, buffer.getvalue(), overwrite=overwrite)


def read_record(path: Path) -> dict[str, Any]:
    """The record, as a JSON object, of a PNG made by this project, or of a JSON file that holds one. UserError if there
    is none."""
    try:
        if path.suffix.lower() == ".json":
            text = path.read_text("utf-8-sig")
        else:
            with Image.open(path) as image:
                text = getattr(image, "text", {}).get(RECORD_KEY)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a readable picture"
        raise UserError(f"Cannot read {path}: {reason}.") from error
    if text is None:
        raise UserError(f"{path} holds no record of how it was made; only PNG files written by flux_jax do.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"The record in {path} is not valid JSON: {error}.") from error
    return Record.from_json(data, f"The record in {path}").to_json()
