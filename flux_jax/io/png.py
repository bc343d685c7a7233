"""Pictures on disk: PNG files that carry what it takes to make them again, written whole or not at all.

In: pixels uint8 [h, w, 3] and a `Record`. Out: a PNG with two text chunks: `parameters`, one paragraph as the web
interfaces for diffusion models write it, and `flux_jax`, the record itself as a JSON object; and such records, read
back: a stranger's, so every value is checked, and no pixel decoded where the record stands before them. No array
library but numpy here, so that reading a record starts quickly.
"""

import contextlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from flux_jax.errors import UserError, shortened
from flux_jax.io import reading
from flux_jax.io.atomic import write_whole
from flux_jax.io.fields import Types, check_fields, check_ranges
from flux_jax.validation import check_prompt, check_text

RECORD_FORMAT = 1
RECORD_KEY = "flux_jax"
NEEDED: dict[str, Any] = {  # what generation relies on in a record that it reads; faults are reported in this order
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
BESIDE: dict[str, Any] = {"device": str | None, "versions": dict | None}  # what is only handed on
OF_MODEL: Types = dict.fromkeys(("id", "name", "sha256", "activations"), str | None)  # known of a record's `model`
MAX_PICTURE = 2**26  # bytes of a file: more than the largest picture takes that may be asked for
MAX_NAME = 4096  # characters of these: what a path may have
HALF = re.compile("[\ud800-\udfff]")  # of a character: a byte of a file's name that is no text, to Python


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
    def from_json(cls, data: Any, where: str, say: Callable[[str], None] = lambda _: None) -> "Record":
        """The record in what `reading.parse_json` gave; `say` gets a sentence about keys that are not known, which
        may have changed the picture. UserError, which begins with `where`, if it is another format, or a field that
        generation relies on is not there, of a wrong type or out of range."""
        found = data.get("format") if isinstance(data, dict) else None
        if type(found) is not int or found != RECORD_FORMAT:
            raise UserError(f"{where} has format {shortened(found)}; this version reads format {RECORD_FORMAT}.")
        check_fields(data, NEEDED | BESIDE, where)
        check_ranges(data, where)
        check_fields(data["model"], OF_MODEL, f"{where}: its model")
        try:
            check_prompt(data["prompt"])
            check_text(data.get("negative_prompt") or "", "negative prompt")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if any(len(data["model"].get(key) or "") > MAX_NAME for key in OF_MODEL):
            raise UserError(f"{where} names a model in more than {MAX_NAME} characters.")
        known = {each.name for each in fields(cls)}
        unknown = [*(data.keys() - known - {"format"}), *(f"model.{key}" for key in data["model"].keys() - OF_MODEL)]
        if unknown:
            names = shortened(", ".join(sorted(unknown)), 160, quote=False)
            say(f"{where} says what this version does not know, and leaves out: {names}.")
        given = {key: data[key] for key in data if key in known and data[key] is not None}
        return cls(**given)


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
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items())])


def _quoted(value: Any) -> str:
    """A value among such pairs: in JSON's quotation marks, as the web interfaces do it, where it could be taken for
    more than one."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n\r]', text) else text


def write_png(path: Path, image: Image.Image, record: Record | dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes image and record (or its JSON object) at once. Raises UserError if `path` exists (unless `overwrite`) or
    cannot be written."""
    entry = record.to_json() if isinstance(record, Record) else record
    info = PngImagePlugin.PngInfo()
    texts = {"parameters": parameters_text(entry), RECORD_KEY: json.dumps(entry, ensure_ascii=False, default=_simple)}
    for key, text in texts.items():
        info.add_itxt(key, HALF.sub(lambda half: f"\\\\u{ord(half[0]):x}", text))  # a text that says so, in JSON, too
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=info)
    write_whole(path, buffer.getvalue(), overwrite=overwrite)


def _simple(value: Any) -> Any:
    """What JSON does not know, numpy's numbers for one: no picture is lost to its record."""
    return value.item() if isinstance(value, np.generic) else str(value)


def read_record(path: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The record, as a JSON object, of a PNG made by this project, or of a JSON file that holds one; `say` as in
    `Record.from_json`. UserError if there is none."""
    text = reading.read_text(path) if path.suffix.lower() == ".json" else _record_text(path)
    if text is None:
        raise UserError(f"{path} holds no record of how it was made; only PNG files written by flux_jax do.")
    where = f"The record in {path}"
    return Record.from_json(reading.parse_json(text, where), where, say).to_json()


def _record_text(path: Path) -> str | None:
    """The text chunk with the record; None where there is none. Other programs may have moved it behind the pixels."""
    with opened(path) as image:
        if RECORD_KEY not in image.info and not getattr(image, "is_animated", False):
            image.load()
            return getattr(image, "text", {}).get(RECORD_KEY)
        return image.info.get(RECORD_KEY)


@contextlib.contextmanager
def opened(path: Path, remedy: str = "") -> Iterator[Image.Image]:
    """A PNG file as Pillow opens it; what goes wrong, there or inside, is a UserError that ends with the remedy."""
    data = reading.read_bytes(path, most=MAX_PICTURE, remedy=remedy)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                yield image
    except Exception as error:  # damage makes Pillow raise nearly anything
        raise reading.unreadable(path, "it is not a readable PNG picture", remedy) from error
