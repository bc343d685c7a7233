"""Published model files for the converter's tests, written without the converter: names by the table in BFL's and
diffusers' own sources, spelt out here a second time so that a mistake in `convert.rules` cannot hide.

In: a FluxConfig, a seed. Out: dicts of name -> array in diffusers' layout, the same weights in BFL's, files and
folders. `load_module` is the way back, by the converter, from such a dict to one of our modules.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from convert.engine import conversion_error, map_weights, read_weight
from flux_jax.config import FluxConfig, TransformerConfig, VAEConfig
from flux_jax.io.safetensors import FLOATS, Entry, Source
from flux_jax.models.params import abstract_component, assemble

BF16 = ml_dtypes.bfloat16
PROMPTS = [  # what tokenizers differ in
    "a red circle to the left of a blue square",
    "",
    "   ",
    " A  RED\tcircle, and two Green squares. ",
    "e\u0301 E\u0301 ﬁ 123!?",
    "Élan naïve 你好 🎈",
    "don't it's we'll they'd I'm you've they're",
    "new\nline, no-break\u00a0space, zero\u200bwidth, bell\x07",
    "</s> <pad> <unk> <|endoftext|> x <|startoftext|> <|ENDOFTEXT|> <|STARTOFTEXT|> <extra_id_0>",
    "a " * 80,
    "star" * 40,
]


def diffusers_transformer(c: TransformerConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of FluxTransformer2DModel, random bf16: 1160 for FLUX.1-dev's depth, 1156 for schnell's."""
    rng, d, out = np.random.default_rng(seed), c.hidden_size, {}

    def linear(name, rows, columns):
        out[f"{name}.weight"] = rng.standard_normal((rows, columns), np.float32).astype(BF16)
        out[f"{name}.bias"] = rng.standard_normal(rows, np.float32).astype(BF16)

    for embedder, width in (("timestep", c.timestep_dim), ("guidance", c.timestep_dim), ("text", c.pooled_dim)):
        if embedder != "guidance" or c.guidance_embeds:
            linear(f"time_text_embed.{embedder}_embedder.linear_1", d, width)
            linear(f"time_text_embed.{embedder}_embedder.linear_2", d, d)
    linear("x_embedder", d, c.in_channels)
    linear("context_embedder", d, c.text_dim)
    linear("norm_out.linear", 2 * d, d)
    linear("proj_out", c.in_channels, d)
    for i in range(c.num_double_blocks):
        b = f"transformer_blocks.{i}."
        for stream in ("norm1", "norm1_context"):
            linear(f"{b}{stream}.linear", 6 * d, d)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            linear(f"{b}attn.{name}", d, d)
        for name in ("ff", "ff_context"):
            linear(f"{b}{name}.net.0.proj", 4 * d, d)
            linear(f"{b}{name}.net.2", d, 4 * d)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            out[f"{b}attn.{name}.weight"] = rng.standard_normal(c.head_dim, np.float32).astype(BF16)
    for i in range(c.num_single_blocks):
        b = f"single_transformer_blocks.{i}."
        linear(f"{b}norm.linear", 3 * d, d)
        for name in ("to_q", "to_k", "to_v"):
            linear(f"{b}attn.{name}", d, d)
        linear(f"{b}proj_mlp", 4 * d, d)
        linear(f"{b}proj_out", d, 5 * d)
        for name in ("norm_q", "norm_k"):
            out[f"{b}attn.{name}.weight"] = rng.standard_normal(c.head_dim, np.float32).astype(BF16)
    return out


def bfl_transformer(source: Mapping[str, np.ndarray], c: TransformerConfig) -> dict[str, np.ndarray]:
    """The same weights as BFL's single file has them: 780 tensors for dev, 776 for schnell."""
    left, out = dict(source), {}

    def move(theirs, *names):
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in left:
                out[f"{theirs}.{kind}"] = np.concatenate([left.pop(f"{name}.{kind}") for name in names])

    for theirs, name in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text")):
        move(f"{theirs}_in.in_layer", f"time_text_embed.{name}_embedder.linear_1")
        move(f"{theirs}_in.out_layer", f"time_text_embed.{name}_embedder.linear_2")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = np.split(left.pop(f"norm_out.linear.{kind}"), 2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = np.concatenate([shift, scale])
    for i in range(c.num_double_blocks):
        ours, b = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        move(f"{ours}img_mod.lin", f"{b}norm1.linear")
        move(f"{ours}txt_mod.lin", f"{b}norm1_context.linear")
        move(f"{ours}img_attn.qkv", *(f"{b}attn.to_{x}" for x in "qkv"))
        move(f"{ours}txt_attn.qkv", *(f"{b}attn.add_{x}_proj" for x in "qkv"))
        move(f"{ours}img_attn.proj", f"{b}attn.to_out.0")
        move(f"{ours}txt_attn.proj", f"{b}attn.to_add_out")
        for stream, ff in (("img", "ff"), ("txt", "ff_context")):
            move(f"{ours}{stream}_mlp.0", f"{b}{ff}.net.0.proj")
            move(f"{ours}{stream}_mlp.2", f"{b}{ff}.net.2")
        for stream, added in (("img", ""), ("txt", "added_")):
            for short, long in (("q", "query"), ("k", "key")):
                out[f"{ours}{stream}_attn.norm.{long}_norm.scale"] = left.pop(f"{b}attn.norm_{added}{short}.weight")
    for i in range(c.num_single_blocks):
        ours, b = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        move(f"{ours}modulation.lin", f"{b}norm.linear")
        move(f"{ours}linear1", *(f"{b}attn.to_{x}" for x in "qkv"), f"{b}proj_mlp")
        move(f"{ours}linear2", f"{b}proj_out")
        for short, long in (("q", "query"), ("k", "key")):
            out[f"{ours}norm.{long}_norm.scale"] = left.pop(f"{b}attn.norm_{short}.weight")
    assert not left
    return out


def bfl_vae(source: Mapping[str, np.ndarray], c: VAEConfig) -> dict[str, np.ndarray]:
    """A diffusers AutoencoderKL's tensors as ae.safetensors has them."""
    out = {}
    for name, value in source.items():
        half, rest = name.split(".", 1)
        words = rest.split(".")
        if words[0] in ("down_blocks", "up_blocks"):
            level = int(words[1]) if words[0] == "down_blocks" else len(c.channels) - 1 - int(words[1])
            kind = words[0].removesuffix("_blocks")
            if words[2] == "resnets":
                inner = f"block.{words[3]}." + ".".join(words[4:]).replace("conv_shortcut", "nin_shortcut")
            else:
                inner = f"{kind}sample.conv.{words[-1]}"
            rest = f"{kind}.{level}.{inner}"
        elif words[:2] == ["mid_block", "resnets"]:
            rest = f"mid.block_{int(words[2]) + 1}." + ".".join(words[3:])
        elif words[0] == "mid_block":
            inner = ".".join(words[3:])
            for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", "")):
                inner = inner.replace(ours, theirs)
            rest = f"mid.attn_1.{inner}"
            if value.ndim == 2:
                value = value[:, :, None, None]
        else:
            rest = rest.replace("conv_norm_out", "norm_out")
        out[f"{half}.{rest}"] = value
    assert len(out) == len(source)
    return out


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)
    return path


def write_shards(folder: Path, tensors: Mapping[str, np.ndarray], shards: int, stem: str = "diffusion_pytorch_model"):
    """Shards and their index, as diffusers writes them."""
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def config_file(path: Path, config: FluxConfig) -> Path:
    path.write_text(json.dumps(config.to_json()))
    return path


@dataclass
class InMemory(Source):
    """Tensors that lie in no file, for the converter."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        return self.arrays[name]


def load_module(component: str, config: FluxConfig, tensors: Mapping[str, Any], dtype=jnp.float32) -> nnx.Module:
    """A component of the model from tensors in any known format. UserError with all faults."""
    names = {np.dtype(kind): name for name, kind in FLOATS.items()}
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    entries = {name: Entry(names.get(value.dtype, str(value.dtype)), value.shape) for name, value in arrays.items()}
    source = InMemory("tensors in memory", entries, arrays=arrays)
    plan = map_weights(component, config, source)
    if plan.faults:
        raise conversion_error(plan.faults, f"these tensors are not a {component} of this configuration")
    return assemble(
        abstract_component(component, config),
        lambda names: {name: read_weight(source, plan.weights[name], dtype) for name in names},
    )


def transformers_ids(tokenizer, prompts: list[str], length: int) -> np.ndarray:
    """Ids [b, length] of one of transformers' tokenizers, called as FLUX's pipeline does."""
    return np.array(tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids)
