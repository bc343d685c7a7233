"""The captions of FLUX-nano: a small closed grammar in GenEval's six tags, its inverse, what is kept out of training.

    prefix   none | "a photo of" | "a picture of" | "a drawing of" | "an image of" | "a painting of"
    single_object  a circle | one circle | a single circle
    colors         a red circle | one red circle | a single red circle
    two_object     a circle and a square | one circle and one square | a single circle and a single square
    color_attr     a red circle and a blue square
    counting       three triangles | three red triangles
    position       a circle above a square | a red circle to the left of a blue square

Two named objects always have two shapes and, where colours are named, two colours.

Held out. A combination below never stands in a training caption, so every caption that has one is new:
  pair    a colour on a shape: 8 of 48 (each colour lacks one shape)                      -> tag colors
  shapes  two shapes with neither colours nor a place, whatever the order: 3 of 15        -> tag two_object
  number  a count of a coloured shape: for half of the pairs, one of 2, 3, 4              -> tag counting, with colours
  place   one coloured shape to the left of or above another: one in five, by a hash      -> tag position, with colours
  binding two colours on two shapes: one in five, by a hash                               -> tag color_attr
Were a number missing for every pair, or for each shape a second one in any picture, training would teach just that, as
a rule of this world: which never happens. So half of the pairs have every number, and the three couples of shapes do
come together, with colours or a place in the caption; a place is missing only between two shapes of certain colours.
`scene_for` keeps pairs, numbers and bindings out of training pictures too; shapes and places only out of the captions.
Nothing can be kept out for single_object: it names only a shape.
A held-out caption has its own tag's held-out combination and none of a simpler kind, so that a tag measures one thing.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np

from flux_jax.nano.scenes import COLORS, SHAPES, USUAL_COLORS, Place, Scene, paint, place

EVALUATION = {  # GenEval's tags, and its numbers of prompts
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
EVALUATION_COUNT = sum(EVALUATION.values())  # 553
TAGS = tuple(EVALUATION)
PREFIXES = ("", "a photo of ", "a picture of ", "a drawing of ", "an image of ", "a painting of ")
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WEIGHTS = dict(zip(TAGS, (0.13, 0.17, 0.20, 0.17, 0.14, 0.19), strict=True))  # of the tags in training

MEANINGS = (len(SHAPES) + 1, len(COLORS) + 1, max(COUNTS.values()) + 1, len(RELATIONS) + 1)  # answers of `meaning`

_DETERMINERS = ("a", "one", "a single")
_NAMES = tuple(COLORS)
_PLURALS = {shape + ("es" if shape.endswith("s") else "s"): shape for shape in SHAPES}
_PLURAL_OF = {shape: plural for plural, shape in _PLURALS.items()}
_UNSEEN_SHAPES = ({"circle", "star"}, {"square", "cross"}, {"triangle", "diamond"})

NOUNS = (*SHAPES, *_PLURALS)

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {word for phrase in (*PREFIXES, *_DETERMINERS, *RELATIONS.values()) for word in phrase.split()}
        | {"a", "an", "and", *COUNTS, *SHAPES, *_PLURALS, *COLORS}
    )
)


@dataclass(frozen=True)
class Spec:
    """What a caption says of one kind of object: `count` of `shape`, all of `color` (None: any)."""

    shape: str
    color: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Caption:
    """A text and its meaning. `relation`: a key of RELATIONS, of the first object to the second, or None."""

    text: str
    tag: str
    objects: tuple[Spec, ...]
    relation: str | None = None


def meaning(caption: Caption) -> np.ndarray:
    """What the caption says of the first and the second object it names, int8 [2, 4]; MEANINGS has the number of
    answers. Shape: 0 for no such object, 1 and on SHAPES; colour: 0 not named, 1 and on COLORS; number: 0 to 4; place
    beside the other: 0 not named, 1 and on RELATIONS."""
    answers = np.zeros((2, len(MEANINGS)), np.int8)
    relations = (caption.relation, OPPOSITE.get(caption.relation or ""))
    for row, spec, relation in zip(answers, caption.objects, relations, strict=False):
        color = 1 + _NAMES.index(spec.color) if spec.color else 0
        where = 1 + tuple(RELATIONS).index(relation) if relation else 0
        row[:] = 1 + SHAPES.index(spec.shape), color, spec.count, where
    return answers


def tag_of(objects: tuple[Spec, ...], relation: str | None) -> str:
    """The GenEval tag that a meaning belongs to."""
    if relation:
        return "position"
    if len(objects) == 2:
        return "color_attr" if objects[0].color else "two_object"
    if objects[0].count > 1:
        return "counting"
    return "colors" if objects[0].color else "single_object"


def phrase(objects: tuple[Spec, ...], relation: str | None = None, prefix: str = "", determiner: str = "a") -> Caption:
    """Puts a meaning into words. `determiner` counts for single objects only ("a", "one", "a single")."""
    parts = []
    for spec in objects:
        noun = " ".join(word for word in (spec.color, spec.shape) if word)
        if spec.count > 1:
            number = next(word for word, count in COUNTS.items() if count == spec.count)
            parts.append(f"{number} {noun[: -len(spec.shape)]}{_PLURAL_OF[spec.shape]}")
        else:
            parts.append(f"{'an' if determiner == 'a' and noun[0] in 'aeiou' else determiner} {noun}")
    text = prefix + f" {RELATIONS[relation] if relation else 'and'} ".join(parts)
    return Caption(text, tag_of(objects, relation), objects, relation)


@cache
def _patterns() -> tuple[re.Pattern, re.Pattern]:
    prefixes = "|".join(prefix.strip() for prefix in PREFIXES if prefix)
    links = "|".join(("and", *RELATIONS.values()))
    number = "|".join(("a single", "an", "a", "one", *COUNTS))
    noun = rf"(?P<number>{number})(?: (?P<color>{'|'.join(COLORS)}))? (?P<noun>{'|'.join((*_PLURALS, *SHAPES))})"
    return re.compile(rf"(?:(?:{prefixes}) )?(.+?)(?: ({links}) (.+))?"), re.compile(noun)


def parse(text: str) -> Caption | None:
    """The meaning of a caption, or None where the grammar does not hold it. Case, spaces, a final full stop and a
    wrong choice of "a" or "an" do not matter; `text` is kept as given."""
    whole, part = _patterns()
    match = whole.fullmatch(" ".join(text.lower().rstrip(". \n").split()))
    if not match:
        return None
    first, link, second = match.groups()
    specs = []
    for words in (first, second) if second else (first,):
        found = part.fullmatch(words)
        if not found:
            return None
        count = COUNTS.get(found["number"], 1)
        noun = str(found["noun"])
        if (noun in _PLURALS) != (count > 1):
            return None
        specs.append(Spec(_PLURALS.get(noun, noun), found["color"], count))
    if len(specs) == 2:
        one, two = specs
        same = one.shape == two.shape or (one.color is not None and one.color == two.color)
        if same or (one.color is None) != (two.color is None) or max(one.count, two.count) > 1:
            return None
    relation = next((name for name, words in RELATIONS.items() if words == link), None)
    objects = tuple(specs)
    return Caption(text, tag_of(objects, relation), objects, relation)


def _hash(*words: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, words)).encode()).digest()[:8], "big")


@cache
def unseen_pair(shape: str, color: str) -> bool:
    """Whether this colour never comes on this shape in training."""
    return (SHAPES.index(shape) + _NAMES.index(color)) % len(SHAPES) == 3


@cache
def unseen_number(shape: str, color: str, count: int) -> bool:
    """Whether this many of this coloured shape never come in training."""
    half, which = divmod(_hash("number", shape, color), 3)
    return half % 2 == 0 and count == 2 + which


@cache
def unseen_place(first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    """Whether no training caption says this of two (shape, colour). "a right of b" and "b left of a" are the same."""
    if relation in ("right of", "below"):
        first, relation, second = second, OPPOSITE[relation], first
    return _hash("placing", *first, relation, *second) % 5 == 0


@cache
def unseen_binding(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether these two (shape, colour) never come together in training, whatever their order."""
    return _hash("binding", *sorted((first, second))) % 5 == 0


def unseen(objects: tuple[Spec, ...], relation: str | None = None) -> frozenset[str]:
    """The kinds of held-out combinations in a meaning: of pair, shapes, number, place, binding."""
    kinds = {"pair" for spec in objects if spec.color and unseen_pair(spec.shape, spec.color)}
    if len(objects) == 1:
        spec = objects[0]
        if spec.color and spec.count > 1 and unseen_number(spec.shape, spec.color, spec.count):
            kinds.add("number")
    else:
        one, two = objects
        if {one.shape, two.shape} in _UNSEEN_SHAPES and one.color is None and relation is None:
            kinds.add("shapes")
        if one.color and two.color:
            first, second = (one.shape, one.color), (two.shape, two.color)
            if relation and unseen_place(first, relation, second):
                kinds.add("place")
            if unseen_binding(first, second):
                kinds.add("binding")
    return frozenset(kinds)


_OWN_KIND = {
    "two_object": "shapes",
    "counting": "number",
    "colors": "pair",
    "position": "place",
    "color_attr": "binding",
}


def held_out(caption: Caption) -> bool:
    """Whether the caption belongs to the evaluation: exactly its own tag's kind of combination is unseen."""
    return unseen(caption.objects, caption.relation) == {_OWN_KIND.get(caption.tag)}


def in_training(caption: Caption) -> bool:
    """Whether training may use the caption: nothing in it is held out."""
    return not unseen(caption.objects, caption.relation)


def sample_caption(rng: np.random.Generator, tag: str, split: str = "train") -> Caption:
    """A random caption of `tag`; split "train": nothing held out in it; "held_out": only such as `held_out` says (for
    single_object, where nothing can be, any)."""
    wanted = held_out if split == "held_out" and tag != "single_object" else in_training
    colored = tag in ("colors", "color_attr") or (
        tag in ("counting", "position") and (rng.random() < 0.5 or split == "held_out")
    )
    number = 2 if tag in ("two_object", "position", "color_attr") else 1
    prefix = PREFIXES[rng.choice(len(PREFIXES), p=(0.35, 0.25, 0.1, 0.1, 0.1, 0.1))]
    determiner = _DETERMINERS[rng.choice(3, p=(0.7, 0.15, 0.15))] if tag in _DETERMINED else "a"
    while True:
        shapes = rng.permutation(len(SHAPES))[:number]
        colors = rng.permutation(len(_NAMES))[:number]
        count = int(rng.integers(2, 5)) if tag == "counting" else 1
        relation = tuple(RELATIONS)[rng.integers(4)] if tag == "position" else None
        objects = tuple(
            Spec(SHAPES[s], _NAMES[c] if colored else None, count) for s, c in zip(shapes, colors, strict=True)
        )
        caption = phrase(objects, relation, prefix, determiner)
        if wanted(caption):
            return caption


_DETERMINED = ("single_object", "two_object", "colors")


def scene_for(rng: np.random.Generator, caption: Caption, split: str = "train") -> Scene:
    """A random scene with exactly the caption's objects. Colours left open are usual ones of the shape (all of one
    colour where objects are counted), and with split "train" never add a held-out combination. A relation holds along
    the axis of the larger offset, which is at least twice the other."""
    while True:
        objects = tuple(
            Spec(spec.shape, spec.color or USUAL_COLORS[spec.shape][rng.integers(3)], spec.count)
            for spec in caption.objects
        )
        if split != "train" or unseen(objects) <= unseen(caption.objects):
            break
    looks = [(spec.shape, str(spec.color)) for spec in objects for _ in range(spec.count)]
    while True:
        boxes = place(rng, len(looks))
        if caption.relation is None or _clear(caption.relation, *boxes):
            return paint(rng, looks, boxes)


def _clear(relation: str, first: Place, second: Place) -> bool:
    across, down = first.x - second.x, first.y - second.y
    major, minor = (across, down) if relation in ("left of", "right of") else (down, across)
    return (major < 0) == (relation in ("left of", "above")) and abs(major) >= 2 * abs(minor)


def sample(rng: np.random.Generator, split: str = "train") -> tuple[Caption, Scene]:
    """One training (or "held_out") example, its tag drawn by WEIGHTS."""
    caption = sample_caption(rng, TAGS[rng.choice(len(TAGS), p=tuple(WEIGHTS.values()))], split)
    return caption, scene_for(rng, caption, split)


def _meanings(tag: str) -> Iterator[tuple[tuple[Spec, ...], str | None]]:
    """Every meaning of a tag: (objects, relation)."""
    if tag == "single_object":
        yield from (((Spec(shape),), None) for shape in SHAPES)
    elif tag == "colors":
        yield from (((Spec(shape, color),), None) for shape, color in product(SHAPES, COLORS))
    elif tag == "counting":
        colors = (None, *COLORS)
        yield from (((Spec(s, c, n),), None) for s, c, n in product(SHAPES, colors, COUNTS.values()))
    else:
        relations = tuple(RELATIONS) if tag == "position" else (None,)
        colored = () if tag == "two_object" else permutations(COLORS, 2)
        plain = () if tag == "color_attr" else ((None, None),)
        for (a, b), colors, relation in product(permutations(SHAPES, 2), (*plain, *colored), relations):
            yield (Spec(a, colors[0]), Spec(b, colors[1])), relation


def _wordings(tag: str, objects: tuple[Spec, ...], relation: str | None) -> list[Caption]:
    """All wordings of a meaning, shuffled by a hash that never changes."""
    determiners = _DETERMINERS if tag in _DETERMINED else ("a",)
    captions = [phrase(objects, relation, *words) for words in product(PREFIXES, determiners)]
    return sorted(captions, key=lambda caption: _hash("wording", caption.text))


@cache
def evaluation_captions() -> tuple[Caption, ...]:
    """The captions of the evaluation, all different, in GenEval's proportions, tag by tag. All but single_object's
    are held out. Few combinations are unseen where there are few in all (8 pairs, 3 couples of shapes, 18 numbers), so
    they come in several wordings each."""
    chosen: list[Caption] = []
    for tag, number in EVALUATION.items():
        meanings = [m for m in _meanings(tag) if tag == "single_object" or unseen(*m) == {_OWN_KIND[tag]}]
        meanings.sort(key=lambda m: _hash("meaning", phrase(*m).text))
        rounds = zip(*(_wordings(tag, *meaning) for meaning in meanings), strict=True)
        chosen += [caption for captions in rounds for caption in captions][:number]
    return tuple(chosen)
