"""FLUX-nano's training set: captions and pictures of the world, as token ids, VAE latents and layouts.

In: a trained VAE, the tokenizers, a seed and a count. Out: `Dataset`, kept in one `.npz` so that a resumed run encodes
nothing twice. Example i depends on (seed, i) alone and batch k on (seed, k) alone, so that a run can go on anywhere.
"""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError
from flux_jax.io import atomic, places, reading
from flux_jax.io.library import library
from flux_jax.models.vae import VAE
from flux_jax.nano import captions, scenes
from flux_jax.sampling.schedule import pack_latents


@dataclasses.dataclass(frozen=True)
class Dataset:
    """tokens float16 [n, i, c] (packed latents), layout uint8 [n, i, s] (what covers each token's square of the
    picture, `scenes.layout`), meaning int8 [n, 2, 4] (`captions.meaning`), t5 int32 [n, t], clip int32 [n, p];
    `empty_*`: ids of no prompt."""

    tokens: np.ndarray
    layout: np.ndarray
    meaning: np.ndarray
    t5: np.ndarray
    clip: np.ndarray
    empty_t5: np.ndarray
    empty_clip: np.ndarray

    def batch(self, seed: int, step: int, size: int) -> dict[str, np.ndarray]:
        """`size` examples drawn with replacement; the same for the same (seed, step)."""
        rows = np.random.default_rng((seed, step)).integers(0, len(self.tokens), size)
        batch = {name: getattr(self, name)[rows] for name in ("layout", "meaning", "t5", "clip")}
        return {"tokens": self.tokens[rows].astype(np.float32), **batch}


def load_or_build(
    path: Path, vae: VAE, tokenizers: Tokenizers, config: FluxConfig, *, seed: int, count: int
) -> Dataset:
    """Read `path`, or render `count` scenes, encode them, and write `path` (whole or not at all). UserError where that
    holds something else, or another number of scenes."""
    if not path.exists():
        places.check_writable(path)
        atomic.write_whole(path, packed(_build(vae, tokenizers, config, seed, count)), overwrite=True)
    remedy = "delete it, and the same command makes it again"
    with library(f"{path} is not what was written", remedy):
        dataset = Dataset(**unpacked(path))
    if {len(dataset.tokens), len(dataset.layout), len(dataset.meaning), len(dataset.t5), len(dataset.clip)} != {count}:
        raise UserError(f"{path} does not hold the {count} examples that are asked for: {remedy}.")
    return dataset


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of an .npz file."""
    # pyrefly: ignore[bad-argument-type] - to numpy's annotations any of them could be `allow_pickle`
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def unpacked(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file: data alone."""
    reading.check_regular(path)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def example(seed: int, index: int) -> tuple[str, scenes.Scene]:
    """Caption and scene number `index`. One caption in six begins with a capital, one in six ends with a full stop:
    T5's tokens tell these apart, and people write both."""
    rng = np.random.default_rng((seed, index))
    caption, scene = captions.sample(rng)
    capital, stop = rng.random(2) < 1 / 6
    text = caption.text[0].upper() + caption.text[1:] if capital else caption.text
    return (text + "." if stop else text), scene


def _build(vae: VAE, tokenizers: Tokenizers, config: FluxConfig, seed: int, count: int) -> dict[str, np.ndarray]:
    encode = jax.jit(lambda vae, images: pack_latents(vae.encode(images.astype(jnp.float32) / 127.5 - 1.0)))
    texts, tokens, layouts, meanings, chunk, pending, size = [], [], [], [], 64, None, config.sampling.height
    for start in tqdm(range(0, count, chunk), desc="encode", mininterval=10):
        examples = [example(seed, i) for i in range(start, start + chunk)]
        texts += [text for text, _ in examples]
        meanings += [captions.meaning(caption) for text, _ in examples if (caption := captions.parse(text))]
        layouts += [scenes.layout(scene, config.default_grid[0], size) for _, scene in examples]
        images = np.stack([scenes.render(scene, size) for _, scene in examples])
        if pending is not None:  # encoded while these scenes were drawn
            tokens.append(np.asarray(pending, np.float16))
        pending = encode(vae, images)
    tokens.append(np.asarray(pending, np.float16))
    return {
        "tokens": np.concatenate(tokens)[:count],
        "layout": np.stack(layouts)[:count],
        "meaning": np.stack(meanings)[:count],
        "t5": tokenizers.t5(texts)[:count],
        "clip": tokenizers.clip(texts)[:count],
        "empty_t5": tokenizers.t5([""]),
        "empty_clip": tokenizers.clip([""]),
    }
