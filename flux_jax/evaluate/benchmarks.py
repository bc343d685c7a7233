"""The prompts of GenEval, T2I-CompBench and PartiPrompts, and where their evaluators look for each picture.

In: the benchmarks' own prompt files. Out: `Picture`s: prompt, seed, path. Picture k of a prompt has seed SEED + k for
every prompt, because both official generators start again at their seed (42) with each prompt.

    geneval, parti   00000/metadata.jsonl (the prompt's line), 00000/samples/0000.png ...     counted over the file
    t2i-compbench    samples/{prompt}_{index:06d}.png      index = images of a prompt * place in the file + k

Subsets. `subset` orders prompts by (r + 1/2) / n, r being a prompt's rank among the n of its tag (parti: category) by
SHA-256 of its text, and takes the first N: always the same ones, all tags in proportion, each subset part of the next
larger one. Paths do not depend on the subset, so that a run on 50 prompts goes on to all.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError
from flux_jax.evaluate.geneval import check_tag
from flux_jax.io.fields import wrong_fields
from flux_jax.io.prompts import read_lines, read_objects, read_table
from flux_jax.validation import check_prompt

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
PROMPTS = 300  # of a category of T2I-CompBench
IMAGES = {"geneval": 4, "t2i-compbench": 10, "parti": 1}  # of a prompt, where nothing else is asked for
SEED = 42
LONGEST_NAME = 255  # bytes: what file systems allow


@dataclass(frozen=True)
class Prompt:
    """`place` counts over the whole file; `stratum` is what subsets keep in proportion; `sidecar` goes to
    metadata.jsonl beside the pictures."""

    place: int
    text: str
    stratum: str = ""
    sidecar: dict[str, Any] | None = None


@dataclass(frozen=True)
class Picture:
    """One picture to make; `path` and `sidecar_path` are relative to the output folder."""

    prompt: str
    seed: int
    path: Path
    sidecar_path: Path | None = None
    sidecar: dict[str, Any] | None = None


def check_complete(path: Path, rows: Sequence[tuple[int, Any]], first: int = 1) -> None:
    """Raises UserError where rows (line number, what it holds) skip a line: pictures are placed by counting lines."""
    for expected, (number, _) in enumerate(rows, first):
        if number != expected:
            raise UserError(f"{path}, line {expected}: there is no prompt; delete the line.")


def _drawable(prompt: str, path: Path, number: int) -> str:
    """The prompt of a line, as `flux_jax.validation.check_prompt` takes it."""
    try:
        return check_prompt(prompt)
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error}") from error


def read_geneval(path: Path) -> list[Prompt]:
    """`evaluation_metadata.jsonl`: objects with tag, prompt and include."""
    found: list[Prompt] = []
    rows = read_objects(path)
    check_complete(path, rows)
    for number, row in rows:
        check_tag(row.get("tag"), f"{path}, line {number}")
        if wrong_fields(row, {"prompt": str, "include": list}) or not row["prompt"].strip():
            raise UserError(f'{path}, line {number}: each line needs a "prompt" and a list "include".')
        found.append(Prompt(len(found), _drawable(row["prompt"], path, number), row["tag"], row))
    return found


def read_parti(path: Path) -> list[Prompt]:
    """`PartiPrompts.tsv`: a heading with Prompt and Category, then one prompt a line."""
    rows = read_table(path, ["Prompt", "Category"])
    check_complete(path, rows, first=2)
    return [
        Prompt(place, _drawable(row["prompt"], path, number), row["category"], row)
        for place, (number, row) in enumerate(rows)
    ]


def read_t2i_compbench(path: Path, images: int = IMAGES["t2i-compbench"]) -> list[Prompt]:
    """`color_val.txt` and its like: one prompt a line. The evaluators find the prompt in the picture's file name, so it
    must fit into one: UserError for "/", "_" (they cut there), or more bytes than a name may have. A line is a prompt
    even where it begins with "#"."""
    found: list[Prompt] = []
    lines = read_lines(path)
    check_complete(path, lines)
    for number, line in lines:
        text = line.split("\t")[0].strip()
        for wrong in "/_\0":
            if wrong in text:
                raise UserError(
                    f"{path}, line {number}: T2I-CompBench puts the prompt into the picture's file name, which cannot "
                    f"hold {wrong!r}; reword the prompt."
                )
        if (length := len(t2i_name(text, images * len(found)).encode())) > LONGEST_NAME:
            raise UserError(
                f"{path}, line {number}: T2I-CompBench puts the prompt into the picture's file name, which would take "
                f"{length} bytes of at most {LONGEST_NAME}; shorten the prompt."
            )
        found.append(Prompt(len(found), text))
    return found


def t2i_name(prompt: str, index: int) -> str:
    return f"{prompt}_{index:06d}.png"


def subset(prompts: list[Prompt], number: int | None) -> list[Prompt]:
    """The first `number` prompts in the order described above, sorted by place again; None: all."""
    if number is None or number >= len(prompts):
        return prompts
    strata: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        strata.setdefault(prompt.stratum, []).append(prompt)
    ordered = []
    for members in strata.values():
        digests = sorted((hashlib.sha256(member.text.encode()).digest(), member.place) for member in members)
        ordered += [((rank + 0.5) / len(members), digest, place) for rank, (digest, place) in enumerate(digests)]
    return [prompts[place] for place in sorted(place for _, _, place in sorted(ordered)[:number])]


def shard(prompts: list[Prompt], part: int, parts: int) -> list[Prompt]:
    """Part `part` of 1 ... `parts`: each `parts`-th prompt, so that every tag is spread evenly."""
    return prompts[part - 1 :: parts]


def folder_pictures(prompts: list[Prompt], images: int, seed: int = SEED) -> list[Picture]:
    """In GenEval's layout, prompt by prompt."""
    return [
        Picture(
            prompt.text,
            seed + k,
            Path(f"{prompt.place:05d}", "samples", f"{k:04d}.png"),
            Path(f"{prompt.place:05d}", "metadata.jsonl"),
            prompt.sidecar,
        )
        for prompt in prompts
        for k in range(images)
    ]


def t2i_pictures(prompts: list[Prompt], images: int, seed: int = SEED) -> list[Picture]:
    """In T2I-CompBench's layout, prompt by prompt."""
    return [
        Picture(prompt.text, seed + k, Path("samples", t2i_name(prompt.text, prompt.place * images + k)))
        for prompt in prompts
        for k in range(images)
    ]
