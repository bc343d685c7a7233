"""Prompts: read from files, counted, held out by hash; all that a distillation ever learns from.

In: files of text, or pipes of the user's shell, as `flux_jax.io.reading` takes them. Out: prompts in order, duplicates
included, without surrounding white space. Lines end at a newline (or CR, or both), not at the rarer marks that a prompt
may hold, and blank ones count for nothing. By the file's name:

    .txt     a prompt a line; a line that begins with "#" is a comment
    .jsonl   a JSON object a line: "prompt" and, if wanted, what SETTINGS names
    .tsv     a heading that names a column Prompt, then rows; quotes are literal, other columns are ignored

A name without a suffix, such as a pipe's, is of the first kind, or of the second where its first line is an object.

`read_lines`, `read_objects` and `read_table` read these three kinds for `flux_jax.evaluate`, too, whose benchmarks are
stricter. And prompts' split: whether one is held out depends on its text alone, so that no run of any seed learns from
it.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError, shortened
from flux_jax.io import reading
from flux_jax.io.fields import wrong_fields
from flux_jax.validation import check_prompt, check_text

HELD_OUT_ONE_IN = 16
MAX_LINES = 1_000_000  # of a file of prompts, blank ones aside
OTHER_KINDS = {  # what is no prompt file, and how it becomes one
    ".json": "write each prompt on a line of its own, as an object, and name the file .jsonl",
    ".csv": "save it as tab-separated text, and name it .tsv",
}
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
    if kind in (".txt", "", ".jsonl"):
        lines = read_lines(path)
        if kind == ".jsonl" or _is_object(lines[0][1]):
            if kind == ".txt":
                raise UserError(f"{path}, line {lines[0][0]}: this is a JSON object; name the file .jsonl.")
            rows = []
            for number, data in _objects(lines, path):
                rows.append(_row(data, number, f"{path}, line {number}"))
                unknown |= data.keys() - SETTINGS.keys() - {"prompt"}
        else:
            texts = [(number, line.strip()) for number, line in lines]
            rows = [_plain(text, number, path) for number, text in texts if not text.startswith("#")]
    elif kind == ".tsv":
        rows = [_plain(cells["prompt"].strip(), number, path) for number, cells in read_table(path, ["Prompt"])]
    else:
        remedy = f"; {OTHER_KINDS[kind]}" if kind in OTHER_KINDS else ""
        raise UserError(f"{path}: prompts come in .txt, .jsonl or .tsv files, not in {shortened(path.suffix)}{remedy}.")
    if not rows:
        raise UserError(f"{path} holds no prompt.")
    return rows, sorted(unknown)


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object, and not a prompt in braces."""
    try:
        return line.lstrip().startswith("{") and isinstance(reading.parse_json(line, ""), dict)
    except UserError:
        return False


def _plain(text: str, line: int, path: Path) -> PromptRow:
    return _row({"prompt": text}, line, f"{path}, line {line}")


def _row(data: dict[str, Any], line: int, where: str) -> PromptRow:
    types = {"prompt": str} | {key: kind for key, kind in SETTINGS.items() if key in data}
    for key in wrong_fields(data, types):
        raise UserError(f"{where}: {key} cannot be {shortened(data[key])}.")
    if not data["prompt"].strip():
        raise UserError(f"{where}: the prompt is empty.")
    try:
        check_prompt(data["prompt"])
        check_text(data.get("negative_prompt", ""), "negative prompt")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    fields = {key: data[key] for key in data if key in SETTINGS}
    for key in ("guidance", "true_cfg"):
        try:
            fields |= {key: float(fields[key])} if key in fields else {}
        except OverflowError as error:
            raise UserError(f"{where}: {key} is too large a number.") from error
    return PromptRow(data["prompt"].strip(), line, fields)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of every line that is not blank, as it stands. UserError where the file cannot be read, or holds
    none, or more than MAX_LINES."""
    text = io.StringIO(reading.read_text(path, most=reading.LARGE, pipes=True), newline=None)
    numbered = []
    for number, line in enumerate(text, 1):  # not splitlines(): see above
        if line.strip():
            numbered.append((number, line.removesuffix("\n")))
        if len(numbered) > MAX_LINES:
            raise UserError(f"{path}, line {number}: {MAX_LINES} prompts are the most of one file; split it.")
    if not numbered:
        raise UserError(f"{path} holds no prompt.")
    return numbered


def read_objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object with a "prompt") of every line of a JSONL file."""
    return _objects(read_lines(path), path)


def _objects(lines: Iterable[tuple[int, str]], path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in lines:
        row = reading.parse_json(line, f"{path}, line {number}")
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
