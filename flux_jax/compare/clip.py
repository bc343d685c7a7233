"""CLIP score: how well a picture fits its prompt (Hessel et al. 2021, arXiv 2104.08718), by any CLIP of the hub.

In: a folder with config.json, model.safetensors and the tokenizer's files (such as openai/clip-vit-large-patch14), the
prompts, pictures uint8 [h, w, 3]. Out: 100 times the cosine between the two towers' projections. Prompts are cut to the
tower's length (77 tokens), pictures to their middle square, as transformers' own processors do.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from PIL import Image

from flux_jax.checkpoints import tokenizers
from flux_jax.compare.networks import Judge, checked, open_source
from flux_jax.compare.towers import IMAGE, PROJECTION, TEXT, CLIPImage, hub_name, read_config
from flux_jax.errors import UserError
from flux_jax.models.clip import CLIPText
from flux_jax.models.layers import Linear

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pictures


def prepare(picture: UInt8[np.ndarray, "h w 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """The picture as the image tower wants it: shorter edge to `size` (bicubic), middle square, normalised."""
    height, width, _ = picture.shape
    shorter = min(height, width)
    resized = (int(size * width / shorter), int(size * height / shorter))
    image = np.asarray(Image.fromarray(picture).resize(resized, Image.Resampling.BICUBIC))
    left, top = ((edge - size) // 2 for edge in resized)
    square = image[top : top + size, left : left + size].astype(np.float32) / np.float32(255)
    mean, deviation = (np.array(x, np.float32).reshape(1, 1, 3) for x in (MEAN, DEVIATION))
    return (square - mean) / deviation


def judge(folder: Path, prompts: Sequence[str]) -> Judge:
    """Measures `clip_a` and `clip_b`: each picture with their prompt. UserError where the folder holds no CLIP."""
    source = open_source(folder)
    towers = read_config(folder / "config.json")
    ids = tokenizers.clip_ids(folder, prompts, towers.text.max_positions)
    if ids.max() >= towers.text.vocab_size:
        raise UserError(f"{folder}: the tokenizer has more tokens than the {towers.text.vocab_size} that CLIP knows.")

    parts = (
        (TEXT, lambda: CLIPText(towers.text, rngs=nnx.Rngs(0))),
        (PROJECTION, lambda: Linear(towers.text.hidden_size, towers.projection, bias=False, rngs=nnx.Rngs(0))),
        (IMAGE, lambda: CLIPImage(towers, rngs=nnx.Rngs(0))),
    )
    loaders = [
        checked(nnx.eval_shape(build), source, functools.partial(hub_name, names), "the CLIP that its config.json says")
        for names, build in parts
    ]

    def start():
        text, projection, image = (load() for load in loaders)

        @jax.jit
        def cosines(text, projection, image, ids, pixels):
            of_text, of_images = projection(text(ids)), image(pixels)
            sizes = jnp.linalg.norm(of_text, axis=-1) * jnp.linalg.norm(of_images, axis=-1)
            return (of_text * of_images).sum(-1) / sizes

        def measure(index: int, a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> dict[str, float]:
            pixels = np.stack([prepare(x, towers.size) for x in (a, b)])
            found = np.asarray(cosines(text, projection, image, ids[index][None], pixels))
            return {"clip_a": 100 * float(found[0]), "clip_b": 100 * float(found[1])}

        return measure

    return start
