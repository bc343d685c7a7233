"""The world of FLUX-nano: scenes of plain coloured shapes, and their exact, anti-aliased pictures.

In: a `Scene` (objects in unit coordinates of the picture, x to the right, y down) or a numpy Generator to draw one.
Out: uint8 pictures [size, size, 3], and what covers each part of them. Only numpy; a scene of four objects takes well
under a millisecond at 128 x 128.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond")

# Chosen so that any two colours, and any colour and background, are at least 95 apart (Euclid, RGB), and so that no
# half-and-half mixture of a colour with a background comes near another colour.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (240, 125, 20),
    "yellow": (252, 225, 50),
    "green": (40, 160, 70),
    "blue": (40, 80, 215),
    "purple": (135, 50, 170),
    "pink": (250, 105, 190),
    "black": (25, 25, 30),
}

BACKGROUNDS: tuple[tuple[int, int, int], ...] = (
    (246, 246, 246),  # white
    (214, 214, 214),  # light grey
    (174, 174, 174),  # grey
    (234, 222, 198),  # sand
    (198, 214, 230),  # mist
)

COLOR_JITTER = 10  # uniform, each channel of an object
BACKGROUND_JITTER = 5  # uniform, one shift for all three channels
GAP = 0.035  # least distance between the boxes of two objects, and from a box to the picture's edge
SIZES = {1: (0.19, 0.22), 2: (0.19, 0.22), 3: (0.17, 0.20), 4: (0.17, 0.20)}  # range of sizes by number of objects
# Centres lie near the crossings of a grid whose pitch is two image tokens of FLUX-nano (32 of 128 pixels): an edge then
# meets a token in few ways, and however many objects there are, each is drawn as one alone is, which a training of two
# hours can learn.
PITCH = 1 / 4
PLACE_JITTER = 0.02  # uniform, about a crossing, along each axis

Tint = tuple[float, float, float]


@dataclass(frozen=True)
class Object:
    """One shape. `x`, `y`: the centre of its box; `size`: half the side of the square box that holds any shape (all in
    units of the picture's side); `tint`: added to the colour's RGB."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    tint: Tint = (0.0, 0.0, 0.0)


class Place(NamedTuple):
    """Where an object stands, in the units of `Object`."""

    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """Objects (later ones are painted over earlier ones) on `BACKGROUNDS[background]`, lightened by `tint`."""

    objects: tuple[Object, ...]
    background: int
    tint: float = 0.0


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.96


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Equilateral, side 2, point up, its box centred."""
    return np.maximum(y - 0.866, 0.866 * np.abs(x) - 0.5 * y - 0.433)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1.0, np.minimum(x, y) - 0.34)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points, the first upwards; notches at half the tips' radius. All ten edges are folded onto one."""
    y = y - 0.1
    radius, angle = np.sqrt(x * x + y * y), np.arctan2(x, -y)
    angle = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    tip, notch = 1.05, (0.525 * np.cos(np.pi / 5), 0.525 * np.sin(np.pi / 5))
    normal = np.array([notch[1], tip - notch[0]]) / np.hypot(notch[1], tip - notch[0])
    return float(normal[0]) * (radius * np.cos(angle) - tip) + float(normal[1]) * radius * np.sin(angle)


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Width 1.5, height 2."""
    return 0.8 * np.abs(x) + 0.6 * np.abs(y) - 0.6


# The colours that a shape has where a caption leaves its colour open, as a banana is yellow or green.
USUAL_COLORS: dict[str, tuple[str, str, str]] = {
    "circle": ("red", "blue", "pink"),
    "square": ("orange", "green", "black"),
    "triangle": ("red", "green", "purple"),
    "cross": ("yellow", "blue", "black"),
    "star": ("yellow", "pink", "black"),
    "diamond": ("orange", "green", "purple"),
}


# Signed distance to the edge (negative inside; exact along straight edges), in units of the object's size.
DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "diamond": _diamond,
}


def coverage(
    shape: str, x: float, y: float, size: float, side: int, softness: float = 1.0
) -> tuple[slice, slice, np.ndarray]:
    """How much of each pixel of a `side` x `side` picture a shape covers: (rows, columns, float32 [rows, columns]
    in 0..1) for the box that holds it. x, y, size in units of the picture; the edge is a ramp of `softness` pixels."""
    low_x, high_x = max(int((x - size) * side) - 1, 0), min(int((x + size) * side) + 2, side)
    low_y, high_y = max(int((y - size) * side) - 1, 0), min(int((y + size) * side) + 2, side)
    scale = np.float32(1 / (size * side))
    across = (np.arange(low_x, high_x, dtype=np.float32) + np.float32(0.5 - x * side)) * scale
    down = (np.arange(low_y, high_y, dtype=np.float32) + np.float32(0.5 - y * side)) * scale
    distance = DISTANCES[shape](across[None, :], down[:, None])
    alpha = np.clip(np.float32(0.5) - distance * np.float32(size * side / softness), 0, 1)
    return slice(low_y, max(high_y, low_y)), slice(low_x, max(high_x, low_x)), alpha


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """The picture of a scene: uint8 [size, size, 3], the same for the same scene on any machine."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) + np.float32(scene.tint)
    for thing in scene.objects:
        rows, columns, alpha = coverage(thing.shape, thing.x, thing.y, thing.size, size)
        color = np.asarray(COLORS[thing.color], np.float32) + np.asarray(thing.tint, np.float32)
        patch = image[rows, columns]
        patch += alpha[..., None] * (color - patch)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def layout(scene: Scene, cells: int, size: int = 128) -> np.ndarray:
    """How much of each of `cells` x `cells` squares of the picture, row by row, each shape and then each colour covers,
    in 255ths: uint8 [cells * cells, shapes + colours]. ValueError where `cells` does not divide `size`."""
    if size % cells:
        raise ValueError(f"{cells} cells do not divide a picture of {size} pixels")
    names, side = (*SHAPES, *COLORS), size // cells
    share = np.zeros((cells, cells, len(names)), np.float32)
    for thing in scene.objects:
        rows, columns, alpha = coverage(thing.shape, thing.x, thing.y, thing.size, size)
        picture = np.zeros((size, size), np.float32)
        picture[rows, columns] = alpha
        covered = picture.reshape(cells, side, cells, side).mean((1, 3))
        share[..., [names.index(thing.shape), names.index(thing.color)]] += covered[..., None]
    return np.rint(255 * np.minimum(share, 1)).astype(np.uint8).reshape(-1, len(names))


def place(rng: np.random.Generator, count: int) -> list[Place]:
    """Draws `count` (1 to 4) boxes inside the picture, at least GAP apart: sizes range by SIZES, centres
    lie within PLACE_JITTER of the crossings of a grid of PITCH."""
    while True:
        boxes: list[Place] = []
        sizes = rng.uniform(*SIZES[count], 64)
        centres = PITCH * rng.integers(1, round(1 / PITCH), (64, 2)) + rng.uniform(-PLACE_JITTER, PLACE_JITTER, (64, 2))
        inside = np.minimum(centres, 1 - centres).min(1) >= sizes + GAP
        for x, y, size in np.column_stack([centres, sizes])[inside].tolist():
            if all(max(abs(x - u), abs(y - v)) >= size + s + GAP for u, v, s in boxes):
                boxes.append(Place(x, y, size))
                if len(boxes) == count:
                    return boxes


def paint(rng: np.random.Generator, looks: Sequence[tuple[str, str]], boxes: Sequence[Place]) -> Scene:
    """A scene of shapes and colours `looks` in `boxes`, with a random background and jittered tints."""
    tints = rng.uniform(-COLOR_JITTER, COLOR_JITTER, (len(looks), 3)).tolist()
    objects = tuple(
        Object(shape, color, x, y, size, tuple(tint))
        for (shape, color), (x, y, size), tint in zip(looks, boxes, tints, strict=True)
    )
    return Scene(objects, int(rng.integers(len(BACKGROUNDS))), rng.uniform(-BACKGROUND_JITTER, BACKGROUND_JITTER))


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene of `count` objects (left out: 1 to 4) of any shapes and colours, none touching another."""
    count = int(rng.integers(1, 5)) if count is None else count
    names = tuple(COLORS)
    looks = [(SHAPES[rng.integers(len(SHAPES))], names[rng.integers(len(names))]) for _ in range(count)]
    return paint(rng, looks, place(rng, count))
