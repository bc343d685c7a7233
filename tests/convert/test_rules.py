"""Every published name has its place: both layouts of the transformer, the text encoders, the autoencoder, at FLUX.1's
full depth. Nothing here needs torch; values are compared at toy width, shapes at full size.
"""

import dataclasses
import json

import ml_dtypes
import numpy as np
import published
import pytest
from published import load_module
from reference_files import reference_file

from convert.engine import map_weights
from convert.files import weights
from convert.run import convert
from convert.sources import Model
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.config import FluxConfig, dev, schnell
from flux_jax.errors import UserError
from flux_jax.io.safetensors import Entry, Source
from flux_jax.models.params import leaves

LISTS = "reference/flux_configs"
NARROW = {"hidden_size": 8, "num_heads": 1, "axes_dim": (2, 2, 4), "text_dim": 6, "pooled_dim": 4, "in_channels": 4}
TENSORS = {("diffusers", True): 1160, ("diffusers", False): 1156, ("bfl", True): 780, ("bfl", False): 776}


def narrow(guidance: bool) -> FluxConfig:
    """FLUX.1's depth, so its names, at a width of 8."""
    base = dev() if guidance else schnell()
    return dataclasses.replace(base, transformer=dataclasses.replace(base.transformer, **NARROW))


def shapes_only(shapes: dict) -> Source:
    return Source("names and shapes", {name: Entry("BF16", tuple(shape)) for name, shape in shapes.items()})


def shape_list(layout: str, guidance: bool) -> dict:
    shapes = json.loads(reference_file(f"{LISTS}/flux1_dev.{layout}_keys_shapes.json").read_text())
    return {name: shape for name, shape in shapes.items() if guidance or "guidance" not in name}


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@pytest.mark.parametrize("guidance", [True, False])
def test_full_size_shape_lists_map_without_a_tensor_left_over(layout, guidance):
    shapes = shape_list(layout, guidance)
    assert len(shapes) == TENSORS[layout, guidance]
    plan = map_weights("transformer", dev() if guidance else schnell(), shapes_only(shapes))
    assert plan.faults == []
    used = [piece.name for weight in plan.weights.values() for piece in weight.pieces]
    assert sorted(used) == sorted(shapes)


@pytest.mark.parametrize("guidance", [True, False])
def test_the_names_written_by_these_tests_are_the_published_ones(guidance):
    c = narrow(guidance).transformer
    tensors = published.diffusers_transformer(c)
    assert tensors.keys() == shape_list("diffusers", guidance).keys()
    assert published.bfl_transformer(tensors, c).keys() == shape_list("bfl", guidance).keys()


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_the_index_of_the_published_shards(name):
    file = reference_file(f"{LISTS}/FLUX.1-{name}.transformer.index.json")
    index = json.loads(file.read_text())["weight_map"]
    assert index.keys() == shape_list("diffusers", name == "dev").keys()


@pytest.mark.parametrize("guidance", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_both_layouts_give_bit_identical_checkpoints(guidance, tmp_path):
    config = narrow(guidance)
    tensors = published.diffusers_transformer(config.transformer)
    single = published.bfl_transformer(tensors, config.transformer)
    assert (len(tensors), len(single)) == (TENSORS["diffusers", guidance], TENSORS["bfl", guidance])
    published.write_shards(tmp_path / "transformer", tensors, 3)
    published.write(tmp_path / "flux1.safetensors", single)
    opened = []
    for name in ("transformer", "flux1.safetensors"):
        model = Model(config, {"transformer": weights(tmp_path / name, "transformer")}, {}, name)
        assert convert(model, tmp_path / f"from-{name}", quiet=True) == []
        opened.append(Checkpoint.open(tmp_path / f"from-{name}"))
    one, other = opened
    assert one.table("transformer") == other.table("transformer")
    names = list(one.table("transformer"))
    a, b = one.read("transformer", names), other.read("transformer", names)
    assert all(a[n].dtype == ml_dtypes.bfloat16 and a[n].tobytes() == b[n].tobytes() for n in names)
    assert np.array_equal(a["double_blocks.7.img.qkv.weight"][8:16], tensors["transformer_blocks.7.attn.to_k.weight"])
    assert np.array_equal(a["final_layer.mod.bias"][8:], tensors["norm_out.linear.bias"][:8])


def test_t5_xxl_has_its_219_tensors():
    kinds = {"SelfAttention": "qkvo", "DenseReluDense": ("wi_0", "wi_1", "wo")}
    c, shapes = dev().t5, {"shared.weight": (32128, 4096), "encoder.final_layer_norm.weight": (4096,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for i in range(c.num_layers):
        for j, (kind, names) in enumerate(kinds.items()):
            shapes[f"encoder.block.{i}.layer.{j}.layer_norm.weight"] = (4096,)
            for n in names:
                shape = {"wi_0": (10240, 4096), "wi_1": (10240, 4096), "wo": (4096, 10240)}.get(n, (4096, 4096))
                shapes[f"encoder.block.{i}.layer.{j}.{kind}.{n}.weight"] = shape
    assert len(shapes) == 219
    assert map_weights("t5", dev(), shapes_only(shapes)).faults == []
    tied = {"encoder.embed_tokens.weight": shapes.pop("shared.weight")} | shapes
    assert map_weights("t5", dev(), shapes_only(tied)).faults == []
    both = tied | {
        "shared.weight": (32128, 4096),
        "decoder.block.0.layer.0.SelfAttention.q.weight": (1,),
        "lm_head.weight": (1,),
    }
    assert map_weights("t5", dev(), shapes_only(both)).faults == []


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_clip_with_and_without_its_prefix(prefix):
    shapes = {
        f"{prefix}embeddings.token_embedding.weight": (49408, 768),
        f"{prefix}embeddings.position_embedding.weight": (77, 768),
        f"{prefix}embeddings.position_ids": (1, 77),
        f"{prefix}final_layer_norm.weight": (768,),
        f"{prefix}final_layer_norm.bias": (768,),
        "text_projection.weight": (768, 768),
    }
    for i in range(12):
        b = f"{prefix}encoder.layers.{i}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{b}{name}.weight": (768, 768), f"{b}{name}.bias": (768,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{b}{name}.weight": (768,), f"{b}{name}.bias": (768,)}
        shapes |= {f"{b}mlp.fc1.weight": (3072, 768), f"{b}mlp.fc1.bias": (3072,)}
        shapes |= {f"{b}mlp.fc2.weight": (768, 3072), f"{b}mlp.fc2.bias": (768,)}
    assert len(shapes) == 198
    assert map_weights("clip", dev(), shapes_only(shapes)).faults == []


def diffusers_vae(config: FluxConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """AutoencoderKL's tensors, random float32."""
    c, rng, out = config.vae, np.random.default_rng(seed), {}

    def layer(name, *shape):
        out[f"{name}.weight"] = rng.standard_normal(shape, np.float32)
        out[f"{name}.bias"] = rng.standard_normal(shape[0], np.float32)

    def resnet(name, i, o):
        layer(f"{name}.norm1", i)
        layer(f"{name}.conv1", o, i, 3, 3)
        layer(f"{name}.norm2", o)
        layer(f"{name}.conv2", o, o, 3, 3)
        if i != o:
            layer(f"{name}.conv_shortcut", o, i, 1, 1)

    for half, kind, first, last in (
        ("encoder", "down", c.image_channels, 2 * c.latent_channels),
        ("decoder", "up", c.latent_channels, c.image_channels),
    ):
        widths = c.channels if kind == "down" else c.channels[::-1]
        width = widths[0]
        layer(f"{half}.conv_in", width, first, 3, 3)
        for i, o in enumerate(widths):
            for j in range(c.layers_per_block + (kind == "up")):
                resnet(f"{half}.{kind}_blocks.{i}.resnets.{j}", width, o)
                width = o
            if i < len(widths) - 1:
                layer(f"{half}.{kind}_blocks.{i}.{kind}samplers.0.conv", o, o, 3, 3)
        deep = c.channels[-1]
        for j in range(2):
            resnet(f"{half}.mid_block.resnets.{j}", deep, deep)
        layer(f"{half}.mid_block.attentions.0.group_norm", deep)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{half}.mid_block.attentions.0.{name}", deep, deep)
        layer(f"{half}.conv_norm_out", width)
        layer(f"{half}.conv_out", last, width, 3, 3)
    return out


def test_both_layouts_of_the_autoencoder():
    config = dataclasses.replace(dev(), vae=dataclasses.replace(dev().vae, channels=(4, 8, 16, 16), norm_groups=4))
    tensors = diffusers_vae(config)
    assert len(tensors) == 244  # as many as FLUX.1's, whose widths have the same steps
    one = load_module("vae", config, tensors)
    other = load_module("vae", config, published.bfl_vae(tensors, config.vae))
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(leaves(one), leaves(other), strict=True))
    decoder = dict(leaves(one))["decoder.blocks.0.resnets.0.conv1.weight"]
    assert np.array_equal(decoder, tensors["decoder.up_blocks.0.resnets.0.conv1.weight"])


def test_one_report_with_every_fault(snapshot_message):
    config = narrow(True)
    tensors = published.diffusers_transformer(config.transformer)
    tensors["x_embedder.bias"] = np.zeros(8, np.int8)
    tensors["proj_out.weight"] = np.zeros((4, 9), np.float32)
    tensors["transformer_blocks.3.attn.to_q.weight"] = np.zeros((8, 8), np.int16)
    tensors["transformer_blocks.3.attn.lora_A.weight"] = np.zeros((8, 8), np.float32)
    del tensors["single_transformer_blocks.37.proj_mlp.bias"]
    named = (
        "x_embedder.bias is int8",
        "proj_out.weight is [4, 9], must be [4, 8]",
        "transformer_blocks.3.attn.to_q.weight is int16",
        "transformer_blocks.3.attn.lora_A.weight",
        "single_transformer_blocks.37.proj_mlp.bias [32]",
    )
    with snapshot_message.raises(UserError, "5 faults", *named):
        load_module("transformer", config, tensors)


def test_schnell_weights_are_no_dev_model_and_the_other_way_round(snapshot_message):
    for guidance, words in (
        (True, "time_text_embed.guidance_embedder"),
        (False, "time_text_embed.guidance"),
    ):
        tensors = published.diffusers_transformer(narrow(not guidance).transformer)
        with snapshot_message.raises(UserError, words):
            load_module("transformer", narrow(guidance), tensors)


def test_something_else_altogether(snapshot_message):
    with snapshot_message.raises(UserError, "transformer"):
        load_module("transformer", dev(), {"unet.conv_in.weight": np.zeros(3, np.float32)})
