"""Two models on the same captions and seeds: what the second one changed, caption by caption.

In: the verdicts of `flux_jax.evaluate.nano` of two models, in the same order. Out: per tag and overall the difference
of the shares right, with 95 % intervals that use the pairing, and the captions that flipped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flux_jax.errors import UserError
from flux_jax.evaluate import paper, scoring
from flux_jax.evaluate.statistics import average, paired_difference, sign_test
from flux_jax.io.contact_sheet import Judged, judged_sheet
from flux_jax.nano.captions import EVALUATION

MOST_SHOWN = 48  # flipped captions on a sheet
COLUMNS = 8  # pictures in its rows: four captions


def compare(rows: Sequence[dict[str, Any]], against: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`rows` minus `against`. Per tag and overall: difference, its interval, captions both, only the first, only the
    second and neither drew right, and the probability of so uneven flips by chance (`statistics.sign_test`)."""
    keys = ("tag", "prompt", "seed")
    if [[row[k] for k in keys] for row in rows] != [[row[k] for k in keys] for row in against]:
        raise UserError("The two models did not draw the same captions with the same seeds.")
    tags: dict[str, dict[str, Any]] = {}
    estimates = []
    for tag in EVALUATION:
        pairs = [(a["correct"], b["correct"]) for a, b in zip(rows, against, strict=True) if a["tag"] == tag]
        if pairs:
            estimate = paired_difference(*(counts := _counts(pairs)))
            estimates.append(estimate)
            tags[tag] = {"difference": estimate.score, "interval": list(estimate.interval), **_named(counts)}
    counts = _counts([(a["correct"], b["correct"]) for a, b in zip(rows, against, strict=True)])
    overall = average(estimates)
    return {
        "overall": {"difference": overall.score, "interval": list(overall.interval), **_named(counts)},
        "tags": tags,
        "flipped": flipped(rows, against),
    }


def _counts(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int, int, int]:
    both, first, second, neither = ((True, True), (True, False), (False, True), (False, False))
    return pairs.count(both), pairs.count(first), pairs.count(second), pairs.count(neither)


def _named(counts: tuple[int, int, int, int]) -> dict[str, Any]:
    both, first, second, neither = counts
    return {
        "both": both,
        "gained": first,
        "lost": second,
        "neither": neither,
        "chance": sign_test(first, second),
    }


def flipped(rows: Sequence[dict[str, Any]], against: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The captions that one model drew right and the other did not, lost ones first."""
    changed = [(a, b) for a, b in zip(rows, against, strict=True) if a["correct"] != b["correct"]]
    return [
        {
            **{key: a[key] for key in ("index", "tag", "prompt", "seed")},
            "change": "gained" if a["correct"] else "lost",
            "reason": (b if a["correct"] else a)["reason"],
        }
        for a, b in sorted(changed, key=lambda pair: (pair[0]["correct"], pair[0]["index"]))
    ]


def flip_sheet(changes: Sequence[dict[str, Any]], out: Path, against: Path) -> Image.Image | None:
    """The flipped captions' pictures side by side, `out`'s left, `against`'s right; None where nothing flipped."""
    entries = []
    for change in changes[:MOST_SHOWN]:
        file = Path(change["tag"], f"{change['index']:03d}.png")
        gained, note = change["change"] == "gained", f"{change['change']}: {change['reason']}"
        entries += [Judged(out / file, change["prompt"], gained), Judged(against / file, note, not gained)]
    return judged_sheet(entries, COLUMNS) if entries else None


def page(models: Sequence[dict[str, Any]], against: dict[str, Any], paired: Sequence[dict[str, Any]]) -> str:
    """Markdown in the layout of the paper's Table 1: every model's scores, then what `compare` says of each."""

    def cells(found: dict[str, Any], key: str, sign: str) -> list[str]:
        entries = {"overall": found["overall"], **found["tags"]}
        measured = {tag: scoring.cell(entry[key], entry["interval"], 3, sign) for tag, entry in entries.items()}
        return [measured.get(column, scoring.ABSENT) for column in paper.GENEVAL_COLUMNS]

    rows = [[model["model"], *cells(model, "score", "")] for model in (against, *models)]
    for model, result in zip(models, paired, strict=True):
        rows.append([f"{model['model']} − {against['model']}", *cells(result, "difference", "+")])
    count = sum(entry["count"] for entry in against["tags"].values())
    note = f"In brackets: 95 % intervals; {count} captions, the same seeds for all models, differences paired."
    return f"{scoring.markdown(['FLUX-nano', *paper.GENEVAL_COLUMNS.values()], rows)}\n\n{note}\n"


def table(result: dict[str, Any]) -> str:
    """The differences for people: a line for each tag."""
    lines = ["tag            difference  95 % interval     gained  lost  chance of such flips"]
    for name, entry in [("overall", result["overall"]), *result["tags"].items()]:
        low, high = entry["interval"]
        lines.append(
            f"{name:<14} {entry['difference']:+10.3f}  [{low:+.3f}, {high:+.3f}]  "
            f"{entry['gained']:>6}  {entry['lost']:>4}  {entry['chance']:.2g}"
        )
    return "\n".join(lines)
