"""GenEval's judgement, as plain functions over the detections of any detector (Ghosh et al., arXiv 2310.11513, and the
rules of its evaluator).

In: what a detector found in a picture (class -> detections, corners in pixels with y downwards) and a prompt's metadata
(a line of `evaluation_metadata.jsonl`). Out: is the prompt true of the picture, and if not, why. Colours are the
detection's own: GenEval asks CLIP for them, a caller may ask anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux_jax.errors import UserError, shortened
from flux_jax.nano.captions import EVALUATION
from flux_jax.nano.relations import Box, Number, relations

TAGS = EVALUATION  # and GenEval's numbers of prompts, which are FLUX-nano's, too
CONFIDENCE = 0.3  # below it a detection does not count ...
COUNTING_CONFIDENCE = 0.9  # ... nor below this, where objects are counted
MAX_OBJECTS = 16  # of one class
MAX_OVERLAP = 1.0  # of two detections of one class; 1 keeps all, as the published scores do


def check_tag(tag: Any, where: str) -> None:
    """UserError, which begins with `where`, for what is none of GenEval's tags."""
    if tag not in tuple(TAGS):  # a tuple: what a file holds need not be hashable
        raise UserError(f"{where}: unknown tag {shortened(tag)}; GenEval has {', '.join(TAGS)}.")


@dataclass(frozen=True)
class Detection:
    """box: x0, y0, x1, y1 in pixels; `color` only where prompts name one."""

    box: Box
    confidence: Number = 1.0
    color: str | None = None


def overlap(a: Detection, b: Detection) -> Number:
    """Intersection over union of the boxes, in whole pixels: both edges belong to the box."""

    def area(x0: Number, y0: Number, x1: Number, y1: Number) -> Number:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    common = area(max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1))
    union = area(*a.box) + area(*b.box) - common
    return common / union if union else 0


def keep(
    detections: Iterable[Detection],
    confidence: Number = CONFIDENCE,
    max_objects: int = MAX_OBJECTS,
    max_overlap: Number = MAX_OVERLAP,
) -> list[Detection]:
    """The detections of one class that count, most certain first: above `confidence`, at most `max_objects`, and of
    those that overlap by `max_overlap` or more only the most certain (1: all)."""
    ordered = sorted((d for d in detections if d.confidence > confidence), key=lambda d: -d.confidence)
    kept: list[Detection] = []
    for detection in ordered[:max_objects]:
        if max_overlap >= 1 or all(overlap(detection, other) < max_overlap for other in kept):
            kept.append(detection)
    return kept


def judge(metadata: Mapping[str, Any], detections: Mapping[str, Iterable[Detection]]) -> tuple[bool, str]:
    """Whether a prompt is true of a picture, and what contradicts it (a line each).

    metadata: `tag`; `include`, all of which must hold: class, count, and where named color and position (relation,
    index of the object it refers to); `exclude`, none of which may: class and count. Only the `count` most certain
    detections of a class are looked at for colour and position. More objects than asked for do harm only where
    `exclude` says so, which it does in counting.
    """
    least = COUNTING_CONFIDENCE if metadata["tag"] == "counting" else CONFIDENCE
    objects = {name: keep(found, least) for name, found in detections.items()}
    matched: list[list[Detection] | None] = []
    faults: list[str] = []
    for wanted in metadata.get("include", ()):
        found = objects.get(wanted["class"], [])[: wanted["count"]]
        fault = _fault(wanted, found, matched)
        matched.append(None if fault else found)
        if fault:
            faults.append(fault)
    for unwanted in metadata.get("exclude", ()):
        number = len(objects.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            faults.append(f"{number} of {unwanted['class']}, fewer than {unwanted['count']} expected")
    return not faults, "\n".join(faults)


def _fault(wanted: Mapping[str, Any], found: Sequence[Detection], matched: Sequence[Sequence[Detection] | None]) -> str:
    name, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"{len(found)} of {name}, {count} expected"
    if "color" in wanted:
        colors = [d.color for d in found]
        if colors.count(wanted["color"]) < count:
            return f"{name} is {', '.join(map(str, colors))}, {wanted['color']} expected"
    if "position" in wanted:
        relation, index = wanted["position"]
        targets = matched[index]
        if targets is None:
            return f"nothing for {name} to be {relation}"
        for a in found:
            for b in targets:
                if relation not in (true := relations(a.box, b.box)):
                    return f"{name} is {' and '.join(sorted(true)) or 'nowhere clear'}, {relation} expected"
    return ""
