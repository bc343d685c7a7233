"""Random judging networks as users have them on disk, without torch: for tests of what stands around the networks."""

import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
import tiny_model
from flax import nnx

from flux_jax.compare import lpips, towers
from flux_jax.models.clip import CLIPText
from flux_jax.models.layers import Linear
from flux_jax.models.params import leaf_table


def clip(folder: Path) -> Path:
    """A CLIP of one layer a tower, with the tokenizer of `tiny_model`."""
    config = tiny_model.config()
    shutil.copytree(tiny_model.tokenizers(folder.with_name("clip-words"), config) / "clip", folder)
    text = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text |= {"num_hidden_layers": 1, "max_position_embeddings": 16, "eos_token_id": 2}
    image = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    image |= {"image_size": 32, "patch_size": 8}
    data = {"model_type": "clip", "projection_dim": 8, "text_config": text, "vision_config": image}
    (folder / "config.json").write_text(json.dumps(data))
    sizes = towers.read_config(folder / "config.json")
    tensors = {}
    for names, build in (
        (towers.TEXT, lambda: CLIPText(sizes.text, rngs=nnx.Rngs(0))),
        (towers.PROJECTION, lambda: Linear(16, 8, bias=False, rngs=nnx.Rngs(0))),
        (towers.IMAGE, lambda: towers.CLIPImage(sizes, rngs=nnx.Rngs(0))),
    ):
        tensors |= draw(build, lambda ours, names=names: towers.hub_name(names, ours))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def alexnet(file: Path) -> Path:
    """LPIPS with random weights, the last ones not negative."""
    tensors = draw(lambda: lpips.LPIPS(rngs=nnx.Rngs(0)), lpips.hub_name)
    last = {name: np.abs(value)[..., None, None] for name, value in tensors.items() if name.startswith("lin")}
    safetensors.numpy.save_file(tensors | last, file)
    return file


def draw(build, name_of) -> dict[str, np.ndarray]:
    """Published name -> random array, for every weight of the module."""
    rng = np.random.default_rng(0)
    shapes = leaf_table(nnx.eval_shape(build))
    return {name_of(ours): tiny_model.draw(rng, ours, shape) for ours, shape in shapes.items()}
