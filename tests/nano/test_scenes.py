"""The renderer: exact areas, soft edges, the same picture every time, and scenes whose objects keep their distance."""

import time
from itertools import combinations

import numpy as np
import pytest

from flux_jax.nano.scenes import (
    BACKGROUNDS,
    COLORS,
    GAP,
    SHAPES,
    SIZES,
    Object,
    Scene,
    coverage,
    layout,
    place,
    render,
    sample_scene,
)

# Areas of shapes of size 1, by geometry
AREAS = {
    "circle": np.pi * 0.96**2,
    "square": 1.72**2,
    "triangle": np.sqrt(3),
    "cross": 4 * 0.68 - 0.68**2,
    "star": 5 * 1.05 * 0.525 * np.sin(np.pi / 5),
    "diamond": 1.5,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.12, 0.3])
def test_a_shape_covers_its_area_inside_its_box(shape: str, size: float):
    side, x, y = 128, 0.513, 0.467
    rows, columns, alpha = coverage(shape, x, y, size, side)
    assert alpha.dtype == np.float32
    assert alpha.sum() / (size * side) ** 2 == pytest.approx(AREAS[shape], rel=0.01)
    down, across = np.nonzero(alpha > 0.5)
    box = np.array([across.min() + columns.start, across.max() + columns.start + 1]) / side - x
    assert np.abs(box).max() <= size + 1 / side
    box = np.array([down.min() + rows.start, down.max() + rows.start + 1]) / side - y
    assert np.abs(box).max() <= size + 1 / side


def test_the_layout_says_what_covers_each_cell():
    things = (Object("cross", "red", 0.25, 0.3, 0.2), Object("star", "blue", 0.7, 0.7, 0.2))
    names, cells = (*SHAPES, *COLORS), 8
    covered = layout(Scene(things, 0), cells)
    assert covered.shape == (cells * cells, len(names))
    assert covered.dtype == np.uint8
    for thing in things:  # areas by geometry, and the same for a thing's shape and its colour
        whole = covered.astype(float).sum(0) / 255 / cells**2
        assert whole[names.index(thing.shape)] == pytest.approx(AREAS[thing.shape] * thing.size**2, rel=0.01)
        np.testing.assert_array_equal(covered[:, names.index(thing.shape)], covered[:, names.index(thing.color)])
    rows, columns = np.divmod(
        np.flatnonzero(covered[:, names.index("cross")]), cells
    )  # in 0.05..0.45 across, 0.1..0.5 down
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (0, 3, 0, 3)
    assert np.flatnonzero(covered.sum(0)).tolist() == sorted(map(names.index, ("cross", "star", "red", "blue")))
    with pytest.raises(ValueError, match="7 cells do not divide"):
        layout(Scene(things, 0), 7)


def test_the_picture_is_anti_aliased_and_its_colours_are_exact():
    color, ground = np.array(COLORS["red"]), np.array(BACKGROUNDS[0])
    image = render(Scene((Object("circle", "red", 0.5, 0.5, 0.25),), 0))
    assert image.shape == (128, 128, 3)
    assert image.dtype == np.uint8
    assert (image[64, 64] == color).all()
    assert (image[2, 2] == ground).all()
    share = (image[..., 2].astype(float) - ground[2]) / (color[2] - ground[2])
    edge = ((share > 0.02) & (share < 0.98)).sum()
    assert 0.5 < edge / (2 * np.pi * 0.24 * 128) < 2.5  # about a pixel wide


def test_an_object_may_leave_the_picture():
    assert render(Scene((Object("star", "blue", 0.0, 1.0, 0.2), Object("circle", "red", 2.0, -2.0, 0.2)), 1)).any()


def test_the_same_scene_gives_the_same_picture():
    one, two = (sample_scene(np.random.default_rng(7)) for _ in range(2))
    assert one == two
    np.testing.assert_array_equal(render(one), render(two))
    assert render(one, 64).shape == (64, 64, 3)


@pytest.mark.parametrize("count", SIZES)
def test_placed_boxes_keep_their_distance(count: int):
    rng = np.random.default_rng(count)
    for _ in range(100):
        boxes = place(rng, count)
        assert len(boxes) == count
        for x, y, size in boxes:
            assert SIZES[count][0] <= size <= SIZES[count][1]
            assert size + GAP <= min(x, y)
            assert max(x, y) <= 1 - size - GAP
        for (x, y, size), (u, v, other) in combinations(boxes, 2):
            assert max(abs(x - u), abs(y - v)) >= size + other + GAP


def test_no_colour_resembles_another_or_a_background():
    colors = np.array(list(COLORS.values()), float)
    apart = [np.linalg.norm(a - b) for a, b in combinations(colors, 2)]
    apart += [np.linalg.norm(a - b) for a in colors for b in np.array(BACKGROUNDS, float)]
    assert min(apart) >= 95


def test_rendering_is_fast_enough_to_feed_training():
    scenes = [sample_scene(np.random.default_rng(i)) for i in range(50)]
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        for scene in scenes:
            render(scene)
        best = min(best, time.perf_counter() - start)
    assert best / len(scenes) < 0.005  # 0.4 ms on an idle core; the limit allows for a busy one
