"""The judge of FLUX-nano: reads a picture back into objects by image analysis (no network) and scores its caption.

In: uint8 pictures [side, side, 3] and captions. Out: a `Reading` (what is there) and a `Verdict` (is the caption true).

Reading: the background is the border's median colour; patches near a colour of the palette are found; each patch is
unmixed from the background into a soft mask, to which every shape's exact coverage is fitted over place and size.
The best shape counts if it explains the mask (overlap >= MIN_OVERLAP) and clearly better than any other (MIN_LEAD).
Anything else that is larger than a speck makes the whole picture unrecognisable, and no caption is true of it. So do
objects of one colour that touch; of two colours they are told apart. The limits are made for pictures of 128 pixels
and more: at 64, blur and noise of 32 dB make the oracle refuse one scene of four small objects in twenty.

Scoring follows GenEval: a named object must be there; counts are exact for the tag counting (of the shape, and all of
the colour where one is named); the colour is that of the found object; a relation holds between the boxes' centres
after a tenth of the boxes' summed sides is taken off, and between the most certain objects where there are several.
As in GenEval, objects beyond the named ones do no harm except in counting; `Verdict.exact` says that there are none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from flux_jax.nano.captions import Caption
from flux_jax.nano.relations import Box, relations
from flux_jax.nano.scenes import BACKGROUNDS, COLORS, SHAPES, coverage

MAX_COLOR_ERROR = 46.0  # RGB distance of an object from its palette colour (jitter makes up to 17)
MAX_BACKGROUND_ERROR = 32.0  # the same for the background and its nearest known tone
BACKGROUND_NOISE = 40.0  # pixels nearer than this to the background belong to it
MIN_PLAIN = 0.8  # share of the border that must be background
SPECK = 0.003  # patches smaller than this share of the picture are overlooked; the smallest object takes four times it
MIN_OVERLAP = 0.88  # soft intersection over union of a mask and its fitted shape
MIN_LEAD = 0.03  # by which the best shape must overlap better than the second best

SOFTNESS = (1.0, 2.0, 3.0)  # pixels: edges from the renderer's own to those of a blurred picture

_PALETTE = np.array(list(COLORS.values()), np.float32)
_NAMES = tuple(COLORS)
_TONES = np.array(BACKGROUNDS, np.float32)


class Fit(NamedTuple):
    """A shape laid over a mask; the better of two is the larger."""

    overlap: float
    x: float
    y: float
    size: float
    shape: str


@dataclass(frozen=True)
class Found:
    """An object as read: x, y, size as in `scenes.Object` (units of the picture's width); `confidence`: the overlap."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    confidence: float

    @property
    def box(self) -> Box:
        return self.x - self.size, self.y - self.size, self.x + self.size, self.y + self.size


@dataclass(frozen=True)
class Reading:
    """All objects found, the most certain first. Not `recognisable`: something is there that is no object; see
    `problem`."""

    objects: tuple[Found, ...]
    recognisable: bool
    problem: str = ""


@dataclass(frozen=True)
class Verdict:
    """`correct`: the caption is true of the picture by GenEval's rules; `exact`: and nothing else is in the picture."""

    correct: bool
    reason: str
    reading: Reading
    exact: bool = False


def read(image: np.ndarray) -> Reading:
    """Reads a square uint8 picture [side, side, 3]. Raises ValueError for other shapes or dtypes."""
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1] or image.dtype != np.uint8:
        raise ValueError(f"expected a square uint8 picture [side, side, 3], got {image.dtype} {list(image.shape)}")
    pixels = image.astype(np.float32)
    background = _background(pixels)
    if background is None:
        return Reading((), False, "no plain background")
    speck = SPECK * pixels[..., 0].size
    foreground = _distance(pixels, background) > BACKGROUND_NOISE
    patches = list(_patches(pixels, foreground, speck))
    found: list[Found] = []
    problem = ""
    explained = np.zeros(foreground.shape, bool)
    for i, (color, patch) in enumerate(patches):
        reach = ndimage.binary_dilation(patch, iterations=3)
        explained |= reach
        for j, (_, other) in enumerate(patches):
            if i != j:
                reach &= ~other
        thing = _recognise(_unmix(pixels, background, patch, reach), _NAMES[color])
        if isinstance(thing, Found):
            found.append(thing)
        else:
            problem = problem or thing
    if not problem and (_components(foreground & ~explained)[1] >= speck).any():
        problem = "a patch of no known colour"
    if not problem and not found:
        problem = "nothing but background"
    found.sort(key=lambda thing: -thing.confidence)
    return Reading(tuple(found), not problem, problem)


def _distance(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    difference = pixels - color
    return np.sqrt(np.einsum("...c,...c->...", difference, difference))


def _background(pixels: np.ndarray) -> np.ndarray | None:
    """The border's commonest colour, [3], or None where the border is not plain or of no known tone."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    color = np.median(border, axis=0)
    near = _distance(border, color) <= BACKGROUND_NOISE
    if near.mean() < MIN_PLAIN or _distance(_TONES, color).min() > MAX_BACKGROUND_ERROR:
        return None
    return border[near].mean(axis=0)


def _patches(pixels: np.ndarray, foreground: np.ndarray, speck: float) -> Iterator[tuple[int, np.ndarray]]:
    """Connected patches of one palette colour, larger than a speck: (colour's index, mask [h, w]). A soft edge may pass
    through another colour, but is too thin to survive the opening."""
    distances = np.stack([_distance(pixels, color) for color in _PALETTE])
    nearest = np.where(foreground & (distances.min(axis=0) <= MAX_COLOR_ERROR), distances.argmin(axis=0), -1)
    for color in range(len(_PALETTE)):
        mask = nearest == color
        if mask.sum() < speck:
            continue
        labels, sizes = _components(ndimage.binary_opening(mask))
        for label in np.flatnonzero(sizes >= speck) + 1:
            yield color, labels == label


def _components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected parts of a mask: their numbers from 1 up [h, w] and sizes in pixels [parts]."""
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    return labels, np.bincount(labels.ravel())[1:]


def _unmix(pixels: np.ndarray, background: np.ndarray, patch: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """How much of each pixel is the patch's own colour and not background: float32 [h, w] in 0..1, 0 beyond reach."""
    direction = np.median(pixels[patch], axis=0) - background
    alpha = ((pixels - background) @ direction) / float(direction @ direction)
    return np.where(reach, np.clip(alpha, 0, 1), 0).astype(np.float32)


def _overlap(mask: np.ndarray, shape: str, x: float, y: float, size: float, softness: float = 1.0) -> float:
    """Soft intersection over union of a mask [side, side] and a shape."""
    rows, columns, alpha = coverage(shape, x, y, size, mask.shape[0], softness)
    common = float(np.minimum(mask[rows, columns], alpha).sum())
    return common / max(float(mask.sum()) + float(alpha.sum()) - common, 1e-6)


def _fit(mask: np.ndarray, shape: str, x: float, y: float, size: float) -> Fit:
    """The best fit of a shape near a first guess, by a search that halves its steps; then with the edge that suits."""
    best = Fit(_overlap(mask, shape, x, y, size), x, y, size, shape)
    step = 0.12 * size
    while step > 0.25 / mask.shape[0]:
        before = best
        for change in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)):
            x, y, size = (value + step * way for value, way in zip((best.x, best.y, best.size), change, strict=True))
            best = max(best, Fit(_overlap(mask, shape, x, y, size), x, y, size, shape))
        if best == before:
            step /= 2
    overlap = max(_overlap(mask, shape, best.x, best.y, best.size, softness) for softness in SOFTNESS)
    return best._replace(overlap=overlap)


def _recognise(mask: np.ndarray, color: str) -> Found | str:
    """The shape that explains a soft mask [side, side], or a sentence on why none does."""
    side = mask.shape[0]
    rows, columns = np.nonzero(mask > 0.5)
    x, y = (columns.min() + columns.max() + 1) / 2 / side, (rows.min() + rows.max() + 1) / 2 / side
    guesses = []
    for shape in SHAPES:
        size = float(np.sqrt(mask.sum() / _UNIT_AREA[shape])) / side
        guesses.append(Fit(_overlap(mask, shape, x, y, size), x, y, size, shape))
    guesses.sort(reverse=True)
    likely = [guess for i, guess in enumerate(guesses) if i < 2 or guess.overlap > guesses[1].overlap - 0.1]
    fits = (_fit(mask, guess.shape, guess.x, guess.y, guess.size) for guess in likely)
    best, second = sorted(fits, reverse=True)[:2]
    if best.overlap < MIN_OVERLAP:
        return f"{color} patch of no known shape (nearest: {best.shape}, overlap {best.overlap:.2f})"
    if best.overlap - second.overlap < MIN_LEAD:
        return f"{color} patch between {best.shape} and {second.shape}"
    return Found(best.shape, color, best.x, best.y, best.size, best.overlap)


def score(image: np.ndarray, caption: Caption) -> Verdict:
    """Whether a picture (uint8 [side, side, 3]) shows what the caption says; see the rules above."""
    reading = read(image)
    if not reading.recognisable:
        return Verdict(False, reading.problem, reading)
    problem = contradiction(reading.objects, caption)
    number = sum(spec.count for spec in caption.objects)
    return Verdict(
        not problem, problem or "as the caption says", reading, not problem and len(reading.objects) == number
    )


def contradiction(objects: tuple[Found, ...], caption: Caption) -> str:
    """In what way objects contradict a caption; empty if they do not."""
    named = []
    for spec in caption.objects:
        same_shape = [thing for thing in objects if thing.shape == spec.shape]
        if caption.tag == "counting" and len(same_shape) != spec.count:
            return f"{len(same_shape)} of {spec.shape} instead of {spec.count}"
        if not same_shape:
            return f"no {spec.shape}"
        matching = [thing for thing in same_shape if spec.color in (None, thing.color)]
        if not matching or len(matching) < spec.count:
            wrong = next(thing for thing in same_shape if thing not in matching)
            return f"{spec.shape} is {wrong.color} instead of {spec.color}"
        named.append(matching[0])
    if caption.relation and caption.relation not in relations(named[0].box, named[1].box):
        return f"{named[0].shape} is not {caption.relation} {named[1].shape}"
    return ""


# The area of each shape of size 1
_UNIT_AREA = {shape: float(coverage(shape, 0.5, 0.5, 0.25, 256)[2].sum()) / 64**2 for shape in SHAPES}
