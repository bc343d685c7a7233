"""FLUX-nano's score: GenEval's six tags, judged by the oracle that knows the renderer.

In: a checkpoint and the held-out captions. Out: `OUT/<tag>/<index>.png`, `OUT/verdicts.jsonl` (per caption: the
verdict, the reason, what the oracle read), `OUT/sheet.png` to look at, and a summary with 95 % intervals, also in
`OUT/summary.json`. Picture i has seed `seed + i`, whatever else is drawn; pictures that are there already are judged,
not made again.
"""

import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux_jax.evaluate.statistics import Estimate, average, wilson
from flux_jax.io import atomic, locks, places, reading
from flux_jax.io.contact_sheet import Judged, judged_sheet
from flux_jax.io.pictures import read_picture
from flux_jax.nano.captions import EVALUATION, Caption, evaluation_captions
from flux_jax.nano.oracle import Verdict, score

VERDICTS = "verdicts.jsonl"


@dataclasses.dataclass(frozen=True)
class CaptionTask:
    """One picture of the evaluation."""

    index: int
    caption: Caption
    seed: int

    def path(self, out: Path) -> Path:
        return out / self.caption.tag / f"{self.index:03d}.png"


def tasks(seed: int = 0, every: int = 1) -> list[CaptionTask]:
    """All pictures of the evaluation, or each `every`-th of every tag (the same ones always)."""
    return [CaptionTask(i, caption, seed + i) for i, caption in enumerate(evaluation_captions())][::every]


def evaluate(pipe: Callable[..., Any], out: Path, *, seed: int = 0, every: int = 1, **sampling: Any) -> dict[str, Any]:
    """Draw what is missing, judge everything, write the files named above; returns the summary.

    pipe: a `FluxPipeline`, or what is called like one. sampling: its further arguments, such as guidance_scale.
    """
    planned, seconds = tasks(seed, every), {"draw": 0.0, "judge": 0.0}
    places.check_writable(out / VERDICTS)
    rows = []
    for task in tqdm(planned, desc="evaluate", mininterval=2):
        start, path = time.perf_counter(), task.path(out)
        if not path.exists():
            picture = pipe(task.caption.text, seed=task.seed, **sampling).images[0]
            atomic.write_whole(path, png(picture), overwrite=True)  # two at once draw the same
        drawn = time.perf_counter()
        verdict = score(np.asarray(read_picture(path)), task.caption)
        rows.append(row(task, verdict))
        seconds["draw"] += drawn - start
        seconds["judge"] += time.perf_counter() - drawn
    result = summary(rows) | {
        "seed": seed,
        "sampling": sampling,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
    }
    atomic.write_whole(out / VERDICTS, lines(rows), overwrite=True)
    atomic.write_whole(out / "summary.json", lines([result]), overwrite=True)
    atomic.write_whole(out / "sheet.png", png(overview(planned, rows, out)), overwrite=True)
    locks.sweep(out)
    return result


def verdicts(out: Path) -> list[dict[str, Any]]:
    """The rows that `evaluate` wrote."""
    where = out / VERDICTS
    return [reading.parse_json(line, str(where)) for line in reading.read_text(where, most=reading.LARGE).splitlines()]


def overview(planned: list[CaptionTask], rows: list[dict[str, Any]], out: Path, columns: int = 8) -> Image.Image:
    """A row of pictures for each tag, evenly spread over its captions."""
    chosen = [i for places in spread([entry["tag"] for entry in rows], columns).values() for i in places]
    entries = [Judged(planned[i].path(out), rows[i]["prompt"], rows[i]["correct"]) for i in chosen]
    return judged_sheet(entries, columns)


def spread(tags: Sequence[str], each: int) -> dict[str, list[int]]:
    """Tag -> `each` places of those that have it in `tags`, evenly spread; tags that none has are left out."""
    places = {tag: [i for i, other in enumerate(tags) if other == tag] for tag in EVALUATION}
    return {tag: [found[k * len(found) // each] for k in range(each)] for tag, found in places.items() if found}


def examples(each: int, seed: int = 0) -> list[CaptionTask]:
    """`each` of every tag's held-out captions, evenly spread, a tag in every sixth place, with the seeds of `tasks`."""
    planned = tasks(seed)
    places = spread([task.caption.tag for task in planned], each)
    return [planned[found[k]] for k in range(each) for found in places.values()]


def png(image: Image.Image) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def row(task: CaptionTask, verdict: Verdict) -> dict[str, Any]:
    """A verdict as a line of `verdicts.jsonl`."""
    return {
        "index": task.index,
        "tag": task.caption.tag,
        "prompt": task.caption.text,
        "seed": task.seed,
        "correct": verdict.correct,
        "exact": verdict.exact,
        "reason": verdict.reason,
        "recognisable": verdict.reading.recognisable,
        "objects": [dataclasses.asdict(found) for found in verdict.reading.objects],
    }


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Per tag: the share of correct pictures with Wilson's 95 % interval. Overall, as in GenEval: the mean over the
    tags, with the interval of `statistics.average`."""
    by_tag: dict[str, list[dict]] = {}
    for entry in rows:
        by_tag.setdefault(entry["tag"], []).append(entry)
    tags: dict[str, dict[str, Any]] = {}
    for tag in EVALUATION:
        if entries := by_tag.get(tag):
            right, count = sum(entry["correct"] for entry in entries), len(entries)
            tags[tag] = {"score": right / count, "interval": wilson(right, count), "count": count}
    parts = [Estimate(t["score"], tuple(t["interval"]), t["count"], t["count"]) for t in tags.values()]
    overall = average(parts)
    return {
        "overall": {"score": overall.score, "interval": list(overall.interval)},
        "tags": tags,
        "exact": float(np.mean([entry["exact"] for entries in by_tag.values() for entry in entries])),
        "recognisable": float(np.mean([entry["recognisable"] for entries in by_tag.values() for entry in entries])),
    }


def lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in rows).encode()


def table(result: dict[str, Any]) -> str:
    """The summary for people: a line for each tag."""
    entries = [("overall", result["overall"]), *result["tags"].items()]
    rows = [f"{name:<14} {e['score']:.3f}  [{e['interval'][0]:.3f}, {e['interval'][1]:.3f}]" for name, e in entries]
    return "\n".join(["tag            score  95 % interval", *rows])
