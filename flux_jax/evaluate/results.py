"""What the official evaluators wrote, read back: GenEval's results.jsonl, T2I-CompBench's vqa_result.json.

In: files, and the folders of pictures that they judge, whoever made these. Out: column -> prompt -> scores of its
pictures, in [0, 1]. A folder with holes, or a result that does not fit its folder, is a UserError: the mean over what
happens to be there is not the benchmark's score.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError, shortened
from flux_jax.evaluate.benchmarks import CATEGORIES, IMAGES, PROMPTS
from flux_jax.evaluate.geneval import TAGS, check_tag
from flux_jax.evaluate.image_folders import RUN, read_run
from flux_jax.io import reading
from flux_jax.io.fields import wrong_fields
from flux_jax.io.prompts import read_objects

_BLIP = "annotation_blip"
_SHARE = "sharegpt4v"  # a language model's marks, 0 to 100
WHERE = {  # category -> where its evaluators leave vqa_result.json; the first is what the paper's table shows
    "color": (_BLIP,),
    "shape": (_BLIP,),
    "texture": (_BLIP,),
    "spatial": ("labels/annotation_obj_detection_2d", "annotation_obj_detection"),
    "3d_spatial": ("labels/annotation_obj_detection_3d",),
    "numeracy": ("annotation_num",),
    "non_spatial": (_SHARE, "annotation_clip"),
    "complex": (_SHARE, "annotation_3_in_1"),
}
OTHER_QUANTITY = {"annotation_clip": "CLIP score", "annotation_3_in_1": "3-in-1 score"}
NAME = re.compile(r"(?P<prompt>[^_]*)_(?P<index>[0-9]{1,18})\.png")
NUMBER = re.compile(r"[0-9]{1,18}")  # a name that counts


@dataclass
class Measured:
    """A model's scores in one benchmark. `notes`: what a reader of the table must know."""

    name: str
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    comparable: bool = True  # each column is the same quantity as the paper's


def read_geneval(path: Path, name: str) -> Measured:
    """results.jsonl, or a folder that has one beside the pictures."""
    if path.is_dir():
        pictures = check_geneval_folder(path)
        path = path / "results.jsonl"
    else:
        pictures = None
    measured = Measured(name, {tag: {} for tag in TAGS})
    rows = read_objects(path)
    for number, row in rows:
        check_tag(row.get("tag"), f"{path}, line {number}")
        if wrong_fields(row, {"prompt": str, "correct": bool}):
            raise UserError(f'{path}, line {number}: each line needs "prompt" and a true or false "correct".')
        measured.scores[row["tag"]].setdefault(row["prompt"], []).append(float(row["correct"]))
    _same_number({prompt: len(each) for tag in measured.scores.values() for prompt, each in tag.items()}, path)
    if pictures is not None and len(rows) != pictures:
        raise UserError(f"{path} judges {len(rows)} pictures, but {pictures} are there; run the evaluator again.")
    counts = {tag: len(prompts) for tag, prompts in measured.scores.items()}
    measured.scores = {tag: prompts for tag, prompts in measured.scores.items() if prompts}
    if counts != TAGS:
        measured.notes.append(f"{name}: {sum(counts.values())} of GenEval's {sum(TAGS.values())} prompts")
    return measured


def read_t2i_compbench(path: Path, name: str) -> Measured:
    """A folder with a folder for each category, or one category's folder (named so, or with our run.json)."""
    measured = Measured(name)
    single = _category_of(path)
    found = {single: path} if single else {c: path / c for c in CATEGORIES if (path / c).is_dir()}
    if not found:
        raise UserError(
            f"{path} is no folder of T2I-CompBench: it needs a folder for each category, of {', '.join(CATEGORIES)}."
        )
    for category, folder in found.items():
        result = _result_file(folder, category)
        if result.parent.name in OTHER_QUANTITY:
            other = OTHER_QUANTITY[result.parent.name]
            measured.notes.append(f"{name}: {category} is the {other}, not the mark that the paper's table shows")
            measured.comparable = False
        measured.scores[category] = _read_answers(result, folder)
    count, whole = sum(map(len, measured.scores.values())), PROMPTS * len(found)
    if count != whole:
        measured.notes.append(f"{name}: {count} of T2I-CompBench's {whole} prompts in {', '.join(found)}")
    return measured


def _category_of(path: Path) -> str | None:
    if (path / RUN).is_file():
        category = read_run(path).get("category")
        return category if category in CATEGORIES else None
    return path.name if path.name in CATEGORIES and not any((path / c).is_dir() for c in CATEGORIES) else None


def _result_file(folder: Path, category: str) -> Path:
    places = [folder / place / "vqa_result.json" for place in (*WHERE[category], ".")]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{folder} has no result for {category}; its evaluator writes {places[0]}.")


def _read_answers(path: Path, folder: Path) -> dict[str, list[float]]:
    """prompt -> scores. Question ids are the pictures' indices, or their ranks where a folder holds a subset."""
    rows = reading.read_json(path, most=reading.LARGE, remedy="run the evaluator again")
    scale = 100.0 if path.parent.name == _SHARE else 1.0
    answers: dict[int, float] = {}
    for position, row in enumerate(rows if isinstance(rows, list) else [None], 1):
        where = f"{path}, entry {position}"
        if not isinstance(row, dict) or wrong_fields(row, {"question_id": int | str, "answer": int | float | str}):
            raise UserError(f'{where}: each entry needs a "question_id" and a numeric "answer".')
        try:
            identity, answer = int(row["question_id"]), float(row["answer"]) / scale
        except (ValueError, OverflowError) as error:
            raise UserError(f'{where}: each entry needs a "question_id" and a numeric "answer".') from error
        if not -1 <= answer <= 1 or identity < 0 or identity in answers:
            raise UserError(f"{where}: answer {shortened(row['answer'], quote=False)} is out of range, or given twice.")
        answers[identity] = answer
    prompts = check_t2i_folder(folder) if (folder / "samples").is_dir() else None
    if prompts is None:
        prompts = {identity: f"prompt {identity // IMAGES['t2i-compbench']}" for identity in answers}
        _same_number(Counter(prompts.values()), path, IMAGES["t2i-compbench"])
    elif set(answers) != set(prompts):
        prompts = dict(enumerate(prompts[index] for index in sorted(prompts)))
    if set(answers) != set(prompts):
        raise UserError(
            f"{path} judges {len(answers)} pictures, but {folder.name}/samples holds {len(prompts)}, or others; "
            "run the evaluator again."
        )
    groups: dict[str, list[float]] = {}
    for identity in sorted(answers):
        groups.setdefault(prompts[identity], []).append(answers[identity])
    return groups


def check_geneval_folder(folder: Path) -> int:
    """The number of pictures in a folder in GenEval's layout; UserError where it is none or has holes."""
    numbers: dict[str, int] = {}
    for sub in (entry for entry in reading.entries(folder) if _counts(entry.name) and entry.is_dir()):
        samples = sub / "samples"
        if not (sub / "metadata.jsonl").is_file():
            raise UserError(f"{sub} has no metadata.jsonl; copy its line of evaluation_metadata.jsonl there.")
        pictures = [entry for entry in reading.entries(samples) if entry.suffix == ".png" and _counts(entry.stem)]
        names = Counter(int(entry.stem) for entry in pictures)
        for expected in range(len(pictures) or 1):
            if names[expected] != 1:
                what = "has a hole: picture {} is missing" if not names[expected] else "has picture {} twice"
                raise UserError(f"{samples} {what.format(expected)}.")
        numbers[str(samples)] = len(pictures)
    if not numbers:
        raise UserError(f"{folder} is no folder of GenEval: it holds no 00000/samples.")
    _same_number(numbers, folder)
    return sum(numbers.values())


def check_t2i_folder(folder: Path) -> dict[int, str]:
    """index -> prompt of the pictures in a folder in T2I-CompBench's layout; UserError where it has holes."""
    prompts: dict[int, str] = {}
    for path in reading.entries(folder / "samples"):
        match = NAME.fullmatch(path.name)
        if not match or int(match["index"]) in prompts:
            what = "has an index that another has" if match else "is not named PROMPT_000000.png"
            raise UserError(f"{path} {what}; T2I-CompBench's evaluators would stumble over it.")
        prompts[int(match["index"])] = match["prompt"]
    if not prompts:
        raise UserError(f"{folder / 'samples'} holds no picture.")
    _same_number(Counter(prompts.values()), folder / "samples")
    return prompts


def _same_number(counts: dict[str, int], path: Path, expected: int | None = None) -> None:
    wanted = expected or max(counts.values(), default=0)
    for key, count in counts.items():
        if count != wanted:
            raise UserError(f"{path} has holes: {shortened(key, 160)} has {count} of {wanted} pictures.")


def _counts(name: str) -> bool:
    return NUMBER.fullmatch(name) is not None


def read(path: Path, name: str) -> tuple[str, Measured]:
    """("geneval" | "t2i-compbench", what was measured), by what is at `path`."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist.")
    numbered = path.is_dir() and any(_counts(entry.name) and entry.is_dir() for entry in reading.entries(path))
    if path.is_file() or numbered or (path / "results.jsonl").is_file():
        return "geneval", read_geneval(path, name)
    return "t2i-compbench", read_t2i_compbench(path, name)


def as_json(estimates: dict[str, Any]) -> dict[str, Any]:
    return {column: estimate.as_dict() for column, estimate in estimates.items()}
