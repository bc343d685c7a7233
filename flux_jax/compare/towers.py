"""CLIP as the hub publishes it: its sizes, its image tower, its weights' names.

In: a config.json; pictures float32 [b, size, size, 3], normalised. Out: `Towers`; what the image tower makes of the
pictures, [b, projection]. The text tower is `flux_jax.models.clip`'s. Architecture: Radford et al. 2021.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.config import WIDTH, CLIPConfig, FluxConfig
from flux_jax.errors import UserError, shortened
from flux_jax.io import published, reading
from flux_jax.io.library import library
from flux_jax.models.clip import ACTIVATIONS, CLIPLayer
from flux_jax.models.layers import Conv, Embedding, LayerNorm, Linear, stack

TEXT = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "position_embedding": "text_model.embeddings.position_embedding",
    "layers": "text_model.encoder.layers",
    "final_norm": "text_model.final_layer_norm",
}
IMAGE = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "patch_embedding": "vision_model.embeddings.patch_embedding",
    "position_embedding": "vision_model.embeddings.position_embedding",
    "first_norm": "vision_model.pre_layrnorm",
    "layers": "vision_model.encoder.layers",
    "final_norm": "vision_model.post_layernorm",
    "projection": "visual_projection",
}
PROJECTION = {"weight": "text_projection.weight"}
INSIDE = {  # a layer
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
PREPARATION = {  # what `preprocessor_config.json` may say of pictures, beside their sizes
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    "resample": (3,),  # bicubic
    "rescale_factor": (1 / 255,),
    "image_mean": ([0.48145466, 0.4578275, 0.40821073],),
    "image_std": ([0.26862954, 0.26130258, 0.27577711],),
}
AGAIN = "download the CLIP again"
ANOTHER = "give the folder of a CLIP such as openai/clip-vit-large-patch14"


@dataclasses.dataclass(frozen=True)
class Towers:
    """A CLIP's sizes. image: as a text tower's, its vocabulary unused, max_positions the number of patches and one;
    size, patch: edges in pixels."""

    text: CLIPConfig
    image: CLIPConfig
    size: int
    patch: int
    projection: int


class CLIPImage(nnx.Module):
    """The image tower, a ViT that is read at its class token: float32 [b, size, size, 3] -> [b, projection]."""

    def __init__(self, towers: Towers, *, dtype=jnp.float32, rngs: nnx.Rngs):
        config = towers.image
        width, patch = config.hidden_size, towers.patch
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,), dtype))
        self.patch_embedding = Conv(
            3, width, patch, stride=patch, padding=((0, 0),) * 2, bias=False, dtype=dtype, rngs=rngs
        )
        self.position_embedding = Embedding(config.max_positions, width, dtype=dtype, rngs=rngs)
        self.first_norm = LayerNorm(width, eps=config.eps, dtype=dtype)
        self.layers = stack(CLIPLayer, config.num_layers, config, False, dtype=dtype, rngs=rngs)
        self.final_norm = LayerNorm(width, eps=config.eps, dtype=dtype)
        self.projection = Linear(width, towers.projection, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        patches = self.patch_embedding(pixels)
        b, *_, width = patches.shape
        first = jnp.broadcast_to(self.class_embedding[...], (b, 1, width))
        x = jnp.concatenate([first, patches.reshape(b, -1, width)], axis=1)
        x = self.first_norm(x + self.position_embedding.weight[...][None])
        x, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)
        return self.projection(self.final_norm(x[:, 0]))


def hub_name(names: dict[str, str], ours: str) -> str:
    """`layers.3.q.bias` -> `text_model.encoder.layers.3.self_attn.q_proj.bias`, with the table of the tower."""
    head, *rest = ours.split(".")
    if head == "layers":
        number, layer, kind = rest
        rest = [number, INSIDE[layer], kind]
    return ".".join([names[head], *rest])


def read_config(path: Path) -> Towers:
    """A CLIP's config.json; what it leaves out has transformers' defaults. UserError where it is none."""
    given = reading.read_object(path, remedy=AGAIN)
    if given.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantized: give a CLIP in float32, float16 or bfloat16.")
    with library(f"{path} does not describe a CLIP model as the hub has them", ANOTHER):
        if (kind := given.get("model_type", "clip")) != "clip":
            raise ValueError(f"its model_type is {shortened(kind)}, not 'clip'")
        data = published.transformers().CLIPConfig.from_dict(given)
        text, image = data.text_config, data.vision_config
        size, patch = _edge("image_size", image.image_size), _edge("patch_size", image.patch_size)
        return Towers(
            _tower(text, text.max_position_embeddings, vocab_size=text.vocab_size, eos_token_id=text.eos_token_id),
            _tower(image, (size // patch) ** 2 + 1),
            size,
            patch,
            _edge("projection_dim", data.projection_dim),
        )


def check_preparation(path: Path, size: int) -> None:
    """UserError where a folder's preprocessor_config.json asks for pictures that are made otherwise than
    `flux_jax.compare.clip` makes them: edges of `size` pixels, CLIP's own colours."""
    given = reading.read_object(path, remedy=AGAIN)
    ours = {
        **PREPARATION,
        "size": (size, {"shortest_edge": size}),
        "crop_size": (size, {"height": size, "width": size}),
    }
    for key, values in ours.items():
        if key in given and given[key] not in values:
            raise UserError(f"{path}: {key} is {shortened(given[key])}, only {shortened(values[-1])} is known here.")


def _edge(name: str, value: Any) -> int:
    if type(value) is not int or not WIDTH[0] <= value <= WIDTH[1]:
        raise ValueError(f"{name} must be an int from {WIDTH[0]} to {WIDTH[1]}, not {shortened(value)}")
    return value


def _tower(section: Any, positions: int, **more: int) -> CLIPConfig:
    """A tower's sizes, their types and bounds checked. ValueError for others."""
    if section.hidden_act not in ACTIVATIONS:
        raise ValueError(f"its activation is {shortened(section.hidden_act)}, not {' or '.join(ACTIVATIONS)}")
    values = {
        "hidden_size": section.hidden_size,
        "mlp_dim": section.intermediate_size,
        "num_heads": section.num_attention_heads,
        "num_layers": section.num_hidden_layers,
        "max_positions": positions,
        "eps": section.layer_norm_eps,
        "activation": section.hidden_act,
        **more,
    }
    whole = FluxConfig().to_json()
    return FluxConfig.from_json({**whole, "clip": {**whole["clip"], **values}}).clip
