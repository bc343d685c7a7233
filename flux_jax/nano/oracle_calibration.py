"""The oracle's own error, to be read beside every score.

In: nothing but a seed; held-out scenes are drawn and rendered. Out: the shares that

  wrong           of renders not all of whose objects are read right (shape, colour), or whose caption is not accepted
  wrong_degraded  the same after blur and noise that leave DEGRADED_PSNR dB, as an autoencoder might
  false_accept    of captions of other scenes, not true of this one by the scene itself, that are accepted
  word_changes    of captions changed in one word, so that they are no longer true, that are accepted
  noise, blend, half_drawn   of such pictures that are read as something recognisable
"""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from flux_jax.nano.captions import VOCABULARY, Caption, parse, sample
from flux_jax.nano.oracle import Found, Verdict, contradiction, read, score
from flux_jax.nano.scenes import Object, Scene, render, sample_scene

DEGRADED_PSNR = 32.0


def degrade(rng: np.random.Generator, image: np.ndarray, psnr: float = DEGRADED_PSNR) -> np.ndarray:
    """A uint8 picture blurred as much as half of the allowed error, the rest filled with noise."""
    allowed = 255.0**2 / 10 ** (psnr / 10)
    pixels = image.astype(np.float64)
    blurred, radius = pixels, 0.0
    while np.mean((blurred - pixels) ** 2) < allowed / 2 and radius < 1.0:
        radius += 0.1
        blurred = ndimage.gaussian_filter(pixels, (radius, radius, 0))
    rest = max(allowed - float(np.mean((blurred - pixels) ** 2)), 0.0)
    return np.clip(np.rint(blurred + rng.normal(0, np.sqrt(rest), pixels.shape)), 0, 255).astype(np.uint8)


def truth(scene: Scene) -> tuple[Found, ...]:
    """The objects of a scene as a perfect oracle would read them."""
    return tuple(Found(o.shape, o.color, o.x, o.y, o.size, 1.0) for o in scene.objects)


def word_changes(caption: Caption) -> Iterator[Caption]:
    """All captions of the grammar that differ from this one in one word and mean something else."""
    words = caption.text.split()
    for i in range(len(words)):
        for word in VOCABULARY:
            changed = parse(" ".join((*words[:i], word, *words[i + 1 :])))
            if changed and (changed.objects, changed.relation) != (caption.objects, caption.relation):
                yield changed


def noise(rng: np.random.Generator, side: int = 128) -> np.ndarray:
    """Noise of any grain, from single pixels to soft clouds, and of any strength that could hide an object."""
    grain = rng.uniform(0, side / 12)
    field = ndimage.gaussian_filter(rng.normal(size=(side, side, 3)), (grain, grain, 0), mode="wrap")
    field = rng.uniform(40, 90) * field / field.std() + rng.uniform(90, 250)
    return np.clip(np.rint(field), 0, 255).astype(np.uint8)


def blend(rng: np.random.Generator, side: int = 128) -> np.ndarray:
    """Two pictures, one seen through the other: 35 to 65 % of each."""
    share = rng.uniform(0.35, 0.65)
    first, second = (render(sample_scene(rng), side).astype(np.float64) for _ in range(2))
    return np.rint(share * first + (1 - share) * second).astype(np.uint8)


def half_drawn(rng: np.random.Generator, side: int = 128) -> np.ndarray:
    """A scene of which one object is cut off along a line near its centre, at any angle, sharply or fading. Not cut
    are triangles along an edge (within 30 degrees) if the corner would stay: it is a triangle again."""
    scene = sample_scene(rng)
    thing: Object = scene.objects[-1]
    without = render(Scene(scene.objects[:-1], scene.background, scene.tint), side).astype(np.float64)
    angle, softness = rng.uniform(0, 2 * np.pi), rng.uniform(0.01, thing.size)
    if thing.shape == "triangle":
        angle = np.pi / 2 + rng.integers(3) * 2 * np.pi / 3 + rng.uniform(-np.pi / 6, np.pi / 6)
    at = (np.arange(side) + 0.5) / side
    across, down = at[None, :] - thing.x, at[:, None] - thing.y
    along = np.cos(angle) * across + np.sin(angle) * down - rng.uniform(-0.1, 0.1) * thing.size
    visible = np.clip(0.5 + along / softness, 0, 1)[..., None]
    return np.rint(without + visible * (render(scene, side).astype(np.float64) - without)).astype(np.uint8)


def _right(verdict: Verdict, scene: Scene) -> bool:
    read_looks, true_looks = (
        sorted((thing.shape, thing.color) for thing in things) for things in (verdict.reading.objects, scene.objects)
    )
    return verdict.exact and read_looks == true_looks


def measure(count: int = 1000, seed: int = 0, side: int = 128) -> dict[str, float | int]:
    """All shares of the list above over `count` pictures each (captions: count, and every change of a word)."""
    rng = np.random.default_rng(seed)
    examples = [sample(rng, "held_out") for _ in range(count)]
    wrong = wrong_degraded = others = accepted_others = changes = accepted_changes = 0
    for i, (caption, scene) in enumerate(examples):
        image = render(scene, side)
        verdict = score(image, caption)
        objects = verdict.reading.objects
        wrong += not _right(verdict, scene)
        wrong_degraded += not _right(score(degrade(rng, image), caption), scene)
        other = examples[(i + 1) % count][0]
        if contradiction(truth(scene), other):
            others += 1
            accepted_others += not contradiction(objects, other)
        for changed in word_changes(caption):
            if contradiction(truth(scene), changed):
                changes += 1
                accepted_changes += not contradiction(objects, changed)
    damaged = {
        kind.__name__: sum(read(kind(rng, side)).recognisable for _ in range(count)) / count
        for kind in (noise, blend, half_drawn)
    }
    return {
        "count": count,
        "seed": seed,
        "wrong": wrong / count,
        "wrong_degraded": wrong_degraded / count,
        "false_accept": accepted_others / max(others, 1),
        "word_changes": accepted_changes / max(changes, 1),
        "number_of_word_changes": changes,
        **damaged,
    }
