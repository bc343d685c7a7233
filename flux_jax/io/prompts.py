"""Prompts: read from files, counted, held out by hash; all that a distillation ever learns from.

In: files of UTF-8 text, with or without a byte order mark. Out: prompts in order, duplicates included, without
surrounding white space. Lines end at a newline (or CR, or both), not at the rarer marks that a prompt may hold, and
blank ones count for nothing. By the file's name:

    .txt     a prompt a line; a line that begins with "#" is a comment. A name without a suffix, such as a pipe's, too
    .jsonl   a JSON object a line: "prompt" and, if wanted, what SETTINGS names
    .tsv     a heading that names a column Prompt, then rows; quotes are literal, other columns are ignored

`read_lines`, `read_objects` and `read_table` read these three kinds for `flux_jax.evaluate`, too, whose benchmarks are
stricter. And prompts' split: whether one is held out depends on its text alone, so that no run of any seed learns from
it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError
from flux_jax.io.fields import wrong_fields

HELD_OUT_ONE_IN = 16
SETTINGS = {  # what a .jsonl may say of a picture, beside its prompt
    "id": str | int,
    "seed": int,
    "width": int,
    "height": int,
    "steps": int,
    "guidance": int | float,
    "true_cfg": int | float,
    "negative_prompt": str,
}


@dataclass(frozen=True)
class PromptRow:
    """A prompt, the number of its line, and what the line says of its picture: some of SETTINGS, numbers that may be
    fractions as floats."""

    prompt: str
    line: int
    fields: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> list[str]:
    """The prompts of one file, in order. UserError for a file that is no prompt file."""
    return [row.prompt for row in read_rows(path)[0]]


def read_all(paths: Iterable[Path]) -> list[str]:
    """The prompts of all files, duplicates included."""
    return [prompt for path in paths for prompt in read(path)]


def read_rows(path: Path) -> tuple[list[PromptRow], list[str]]:
    """The prompts of one file with their settings, and the keys in it that mean nothing here. UserError, which names
    the line, for a file that cannot be read, has no prompt, or is of another kind than its name says."""
    unknown: set[str] = set()
    kind = path.suffix.lower()
    if kind in (".txt", ""):
        lines = [(number, line.strip()) for number, line in read_lines(path)]
        rows = [PromptRow(text, number) for number, text in lines if not text.startswith("#")]
    elif kind == ".jsonl":
        rows = []
        for number, data in read_objects(path):
            rows.append(_row(data, number, f"{path}, line {number}"))
            unknown |= data.keys() - SETTINGS.keys() - {"prompt"}
    elif kind == ".tsv":
        rows = [PromptRow(cells["prompt"].strip(), number) for number, cells in read_table(path, ["Prompt"])]
    else:
        raise UserError(f"{path}: prompts come in .txt, .jsonl or .tsv files, not in {path.suffix!r}.")
    if not rows:
        raise UserError(f"{path} holds no prompt.")
    return rows, sorted(unknown)


def _row(data: dict[str, Any], line: int, where: str) -> PromptRow:
    types = {"prompt": str} | {key: kind for key, kind in SETTINGS.items() if key in data}
    for key in wrong_fields(data, types):
        raise UserError(f"{where}: {key} cannot be {data[key]!r}.")
    if not data["prompt"].strip():
        raise UserError(f"{where}: the prompt is empty.")
    fields = {key: data[key] for key in data if key in SETTINGS}
    for key in ("guidance", "true_cfg"):
        try:
            fields |= {key: float(fields[key])} if key in fields else {}
        except OverflowError as error:
            raise UserError(f"{where}: {key} is too large a number.") from error
    return PromptRow(data["prompt"].strip(), line, fields)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of every line that is not blank, as it stands. UserError where the file cannot be read, or holds
    none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"Cannot read {path}: it is not UTF-8 text (line {line}).") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # not splitlines(): see above
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no prompt.")
    return numbered


def read_objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object with a "prompt") of every line of a JSONL file."""
    rows = []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # an escape such as \ud800 alone is half a character
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(row, dict) or "prompt" not in row:
            raise UserError(f'{path}, line {number}: each line must be an object with a "prompt".')
        rows.append((number, row))
    return rows


def read_table(path: Path, required: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, column's name in small letters -> cell) of every row of a TSV file behind its heading. UserError
    where the heading lacks a required column, or a row has nothing in one."""
    (first, heading), *lines = read_lines(path)
    names = [name.strip().lower() for name in heading.split("\t")]
    if first != 1 or not {name.lower() for name in required} <= set(names):
        columns = f"column{'s' if len(required) > 1 else ''} {' and '.join(required)}"
        raise UserError(f"{path}, line 1: the heading must name the {columns}, separated by tabs.")
    rows = []
    for number, line in lines:
        row = dict(zip(names, line.split("\t"), strict=False))
        for name in required:
            if not row.get(name.lower(), "").strip():
                raise UserError(f"{path}, line {number}: the {name.lower()} is empty.")
        rows.append((number, row))
    return rows


def held_out(prompt: str) -> bool:
    """Whether no training may use the prompt: one in sixteen, by its SHA-256."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def split(prompts: Iterable[str]) -> tuple[list[str], list[str]]:
    """(training prompts, held-out ones), each different prompt once, in the order of their first appearance."""
    unique = list(dict.fromkeys(prompts))
    return [p for p in unique if not held_out(p)], [p for p in unique if held_out(p)]


def digest(prompts: Iterable[str]) -> str:
    """SHA-256 of the prompts in order: two runs with the same one saw the same prompts."""
    return hashlib.sha256(json.dumps(list(prompts), ensure_ascii=False).encode()).hexdigest()
