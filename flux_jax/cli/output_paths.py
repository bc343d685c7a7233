"""Where pictures go: names made of prompts, ids and seeds, safe in every file system, and never longer than one takes.

In: what `-o` says, a prompts file, a picture's row, place and seed. Out: paths; UserError for a template that cannot be
filled, or another kind of file. Whether a path can be written is for `flux_jax.io.places.check_writable` to say.
"""

import datetime
import os
import re
import string
import unicodedata
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError

PLACEHOLDERS = ("seed", "i", "id", "prompt")
FORMAT = re.compile(r"[^\d{}]{0,2}\d{0,3}(\.\d{1,3})?[^\d{}]?")  # of a placeholder, such as 04d
PROMPT_BYTES, ID_BYTES, STEM_BYTES = 60, 120, 200  # of a name, at most


class OutputPaths:
    """`-o` with its placeholders filled, or names of our own in a folder. template: `-o`, or None; file: of the
    prompts, or None; prompts, per_prompt: how many pictures there are."""

    def __init__(self, template: str | None, file: Path | None, prompts: int, per_prompt: int):
        self.from_file, self.prompts, self.per_prompt = file is not None, prompts, per_prompt
        self.stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.folder, self.template = Path("outputs") / (file.stem if file else ""), template
        if template is None:
            return
        if os.path.isdir(template):
            self.folder, self.template = Path(template), None
        elif not template.endswith(("/", "\\")) and prompts * per_prompt > 1 and "{" not in template:
            path = Path(template)
            self.template = f"{path.with_suffix('')}-{{i}}{path.suffix}"

    def path(self, row: dict[str, Any], *, index: int, k: int, seed: int) -> Path:
        """Of picture `index` of the run, the k-th of its prompt."""
        if self.from_file:  # neither time nor seed in it, so that the next run finds what is done
            name = slug(str(row["id"]), ID_BYTES) + (f"-{k}" if self.per_prompt > 1 else "")
        else:
            name = f"flux-{self.stamp}-{seed}" + (f"-{index}" if self.prompts > 1 else "")
        if self.template is None:
            return self.folder / f"{name}.png"
        id_ = slug(str(row.get("id", index)), ID_BYTES)
        filled = fill(self.template, {"seed": seed, "i": index, "id": id_, "prompt": slug(row["prompt"])})
        if self.template.endswith(("/", "\\")):
            return Path(filled, f"{name}.png")
        path = Path(filled)
        if path.suffix.lower() not in ("", ".png"):
            raise UserError(f"-o {path}: pictures are written as PNG, which can hold their settings; name it .png.")
        return path if path.suffix or not path.name else path.with_name(path.name + ".png")


def fill(template: str, values: dict[str, Any]) -> str:
    """The template with its placeholders filled."""
    try:
        for _, name, form, conversion in string.Formatter().parse(template):
            if name is not None and (name not in PLACEHOLDERS or conversion or not FORMAT.fullmatch(form or "")):
                raise ValueError
        return template.format(**values)
    except (ValueError, OverflowError, TypeError) as error:
        known = " and ".join([", ".join(f"{{{name}}}" for name in PLACEHOLDERS[:-1]), f"{{{PLACEHOLDERS[-1]}}}"])
        raise UserError(f"-o {template}: only {known} can be filled in.") from error


def slug(text: str, longest: int = PROMPT_BYTES) -> str:
    """Letters and digits of a text, joined by single hyphens, in at most `longest` bytes."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", text.lower())).strip("-")
    return cut(words, longest).rstrip("-") or "picture"


def cut(text: str, longest: int) -> str:
    """As much of a text's beginning as takes at most `longest` bytes."""
    return text.encode(errors="ignore")[:longest].decode(errors="ignore")


def beside(path: Path, number: int) -> Path:
    """A name like a picture's that is taken: NAME-2.png."""
    return path.with_name(f"{cut(path.stem, STEM_BYTES)}-{number}.png")
