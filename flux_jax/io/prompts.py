"""Prompts: read from files, counted, held out by hash; all that a distillation ever learns from.

In: .txt (a prompt a line), .jsonl (objects with "prompt") or .tsv (a header with a column Prompt; quotes are literal)
files. Out: prompts in order, duplicates included, and their split: whether a prompt is held out depends on its text
alone, so that no run of any seed learns from it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from flux_jax.errors import UserError

HELD_OUT_ONE_IN = 16


def read(path: Path) -> list[str]:
    """The prompts of one file, in order, without surrounding white space; blank lines count for nothing. UserError for
    a file that cannot be read, has no prompt, or is of another kind than its name says."""
    readers = {".txt": _txt, ".jsonl": _jsonl, ".tsv": _tsv}
    if path.suffix not in readers:
        raise UserError(f"{path}: prompts come in {', '.join(readers)} files, not in {path.suffix or 'this'!r}.")
    try:
        text = path.read_text("utf-8-sig")  # a byte order mark is no part of the first prompt
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}.") from error
    # Not splitlines(): a prompt may hold one of the rarer marks that it takes for the end of a line.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    prompts = [prompt.strip() for prompt in readers[path.suffix](path, lines)]
    if not any(prompts):
        raise UserError(f"{path} holds no prompt.")
    return [prompt for prompt in prompts if prompt]


def read_all(paths: Iterable[Path]) -> list[str]:
    """The prompts of all files, duplicates included."""
    return [prompt for path in paths for prompt in read(path)]


def _txt(path: Path, lines: list[str]) -> list[str]:
    return lines


def _jsonl(path: Path, lines: list[str]) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f'{path}, line {number}: each line must be a JSON object with a "prompt".') from error
        if not isinstance(prompts[-1], str):
            raise UserError(f"{path}, line {number}: the prompt must be text, not {prompts[-1]!r}.")
    return prompts


def _tsv(path: Path, lines: list[str]) -> list[str]:
    names = [name.strip().lower() for name in lines[0].split("\t")]
    if "prompt" not in names:
        raise UserError(f"{path}: the first line must name its columns, one of them Prompt.")
    column, prompts = names.index("prompt"), []
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            cells = line.split("\t")
            if len(cells) <= column:
                raise UserError(f"{path}, line {number}: {len(cells)} columns, and the prompt is column {column + 1}.")
            prompts.append(cells[column])
    return prompts


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
