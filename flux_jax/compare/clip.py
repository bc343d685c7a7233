"""CLIP score: how well a picture fits its prompt (Hessel et al. 2021, arXiv 2104.08718), by any CLIP of the hub.

In: a folder with config.json, model.safetensors and the tokenizer's files (such as openai/clip-vit-large-patch14), the
prompts, pictures uint8 [h, w, 3]. Out: 100 times the cosine between the two towers' projections. Prompts are cut to the
tower's length (77 tokens), pictures to their middle square, by transformers' own tokenizer and image processor.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from flux_jax.compare.networks import Judge, checked, open_tensors
from flux_jax.compare.towers import AGAIN, IMAGE, PROJECTION, TEXT, CLIPImage, check_preparation, hub_name, read_config
from flux_jax.errors import UserError
from flux_jax.io import published
from flux_jax.io.library import library
from flux_jax.models.clip import CLIPText
from flux_jax.models.layers import Linear


def encode(folder: Path, prompts: Sequence[str], length: int) -> Int[np.ndarray, "b length"]:
    """The prompts' ids int32, cut and padded to `length`. UserError where the folder holds no CLIP tokenizer."""
    tokenizer = published.clip_tokenizer(folder)
    with library(f"{folder}: the tokenizer cannot read a prompt", AGAIN):
        ids = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)["input_ids"]
        return np.array(ids, np.int32)


def prepare(pictures: Sequence[UInt8[np.ndarray, "_h _w 3"]], size: int) -> Float[np.ndarray, "b size size 3"]:
    """The pictures as the image tower wants them: shorter edge to `size` (bicubic), middle square, normalised."""
    # The processor without torch: `CLIPImageProcessor` is torchvision's, where there is torchvision.
    processor = published.transformers().CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    pixels = processor(list(pictures), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    return pixels.transpose(0, 2, 3, 1)


def judge(folder: Path, prompts: Sequence[str]) -> Judge:
    """Measures `clip_a` and `clip_b`: each picture with their prompt. UserError where the folder holds no CLIP."""
    source = open_tensors(folder)
    towers = read_config(folder / "config.json")
    if os.path.lexists(preparation := folder / "preprocessor_config.json"):
        check_preparation(preparation, towers.size)
    ids = encode(folder, prompts, towers.text.max_positions)
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
            pixels = prepare([a, b], towers.size)
            found = np.asarray(cosines(text, projection, image, ids[index][None], pixels))
            return {"clip_a": 100 * float(found[0]), "clip_b": 100 * float(found[1])}

        return measure

    return start
