"""What a file is, by its first bytes and the names and shapes of its tensors; the transformer's numbers from shapes."""

import dataclasses
import io
import pickle
import zipfile

import published
import pytest

from convert import identify
from convert.engine import map_weights
from flux_jax.config import dev, nano, schnell
from flux_jax.errors import UserError
from flux_jax.io.safetensors import Entry, Source

FLUX = ("img_in.weight", "double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight")
T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"


def archive() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as opened:
        opened.writestr("data.pkl", b"")
    return data.getvalue()


FIRST_BYTES = {
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 335304388\n",
    "GGUF": b"GGUF\x03\0\0\0" + bytes(100),
    "web page": b"\n <!DOCTYPE html><html>",
    "pickled": pickle.dumps({"a": 1}, 2),
    "archive": archive(),
    "empty": b"",
    "zeros": bytes(1000),
    "text": b"Access to model black-forest-labs/FLUX.1-dev is restricted.",
    "a text": b'{"error": "Repository not found"}',
}


@pytest.mark.parametrize("kind", FIRST_BYTES)
def test_files_that_are_no_safetensors(tmp_path, kind, snapshot_message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(FIRST_BYTES[kind])
    with snapshot_message.raises(UserError, file, kind):
        identify.refuse_other_kinds(file)


@pytest.mark.parametrize("head", [b"\x80\x02" + bytes(6) + b"{", b"\0" * 8, b"\x01\x02", bytes(8) + b"\x01" * 60])
def test_files_that_could_be(tmp_path, head):
    """A header of 640 bytes begins like a pickle; of what says nothing, the header's own check does."""
    file = tmp_path / "a"
    file.write_bytes(head)
    identify.refuse_other_kinds(file)


def source(names, shape=(4, 4)):
    return Source("file", {name: Entry("BF16", shape) for name in names})


KINDS = {
    "LoRA": [
        ["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"],
        ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
        ["double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.img_attn.proj.lora_B.weight"],
        ["diffusion_model.double_blocks.0.img_attn.proj.lokr_w1"],
    ],
    "bitsandbytes": [
        [*FLUX, "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"],
        [*FLUX, "double_blocks.0.img_attn.qkv.weight.absmax"],
        [T5, "encoder.block.0.layer.0.SelfAttention.q.SCB"],
    ],
    "scaled fp8": [
        [*FLUX, "scaled_fp8"],
        [*FLUX, "double_blocks.0.img_attn.qkv.scale_weight"],
        [f"model.diffusion_model.{name}" for name in (*FLUX, "double_blocks.0.img_attn.qkv.input_scale")],
    ],
    "ComfyUI": [[*FLUX, "double_blocks.0.img_attn.qkv.comfy_quant", "double_blocks.0.img_attn.qkv.weight_scale"]],
    "GPTQ": [[*FLUX, "double_blocks.0.img_attn.qkv.qweight"]],
    "SVDQuant": [["transformer_blocks.0.attn.to_q.qweight", "transformer_blocks.0.attn.to_q.wscales"]],
    "ControlNet": [["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"]],
    "IP-Adapter": [["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], ["image_proj.norm.weight"]],
    "Redux": [["redux_up.weight", "redux_down.weight"]],
    "Chroma": [[*FLUX, "distilled_guidance_layer.in_proj.weight"]],
    "FLUX.2": [[*FLUX, "double_stream_modulation_img.lin.weight"], ["single_stream_modulation.linear.weight"]],
    "Stable Diffusion 3": [["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], ["pos_embed.proj.weight"]],
    "UNet": [
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.weight"],
        ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "time_embedding.linear_1.weight"],
    ],
    "another family": [[*FLUX, "txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight"]],
    "an autoencoder (VAE)": [["decoder.mid.attn_1.q.weight"], ["vae.decoder.mid_block.attentions.0.to_q.weight"]],
    "a T5 text encoder": [[T5]],
    "a CLIP text encoder": [["text_model.encoder.layers.0.self_attn.q_proj.weight"]],
    "language model": [["model.layers.0.self_attn.q_proj.weight"]],
    "nobody": [["nobody.knows.weight"]],
    "no tensor": [[]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_transformer(kind, snapshot_message):
    for names in KINDS[kind]:
        with snapshot_message.raises(UserError, kind):
            identify.take(source(names), "transformer")


def test_what_is_no_other_component(snapshot_message):
    clip = ["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    for component, names, kind in (
        ("vae", FLUX, "--transformer"),
        ("t5", clip, "--clip"),
        ("clip", ["vision_model.encoder.layers.0.self_attn.q_proj.weight"], "pictures"),
        ("clip", ["transformer.resblocks.0.attn.in_proj_weight"], "OpenCLIP"),
        ("t5", [T5, "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"], "UMT5"),
        ("t5", [T5, "encoder.block.0.layer.1.DenseReluDense.wi.weight"], "first version"),
        ("t5", ["decoder.block.0.layer.0.SelfAttention.q.weight"], "decoder"),
        ("vae", ["decoder.mid.attn_1.q.weight", "quant_conv.weight"], "Stable Diffusion"),
        ("vae", ["encoder.layers.0.weight", "decoder.layers.1.conv.0.weight"], "TAESD"),
        ("vae", [f"model.diffusion_model.{name}" for name in FLUX], "--transformer"),
    ):
        with snapshot_message.raises(UserError, kind):
            identify.take(source(names), component)


@pytest.mark.parametrize(("channels", "kind"), [(384, "Fill"), (128, "Canny or Depth"), (96, "picture")])
def test_transformers_that_take_a_picture_too(channels, kind, snapshot_message):
    names = source(FLUX)
    names.entries["img_in.weight"] = Entry("BF16", (3072, channels))
    names.entries["final_layer.linear.weight"] = Entry("BF16", (64, 3072))
    with snapshot_message.raises(UserError, kind):
        identify.take(names, "transformer")
    names.entries["img_in.weight"] = Entry("BF16", (3072, 64))
    assert identify.take(names, "transformer").entries == names.entries


def test_parts_of_an_all_in_one_file():
    everything = {f"model.diffusion_model.{name}" for name in FLUX}
    everything |= {f"text_encoders.t5xxl.transformer.{T5}", "text_encoders.t5xxl.logit_scale", "vae.decoder.mid.x"}
    everything |= {"text_encoders.clip_l.transformer.text_model.a", "text_encoders.clip_g.transformer.text_model.a"}
    whole = source(sorted(everything))
    assert set(identify.part(whole, "transformer").entries) == set(FLUX)
    assert set(identify.part(whole, "t5").entries) == {T5}
    assert set(identify.part(whole, "clip").entries) == {"text_model.a"}
    assert set(identify.part(whole, "vae").entries) == {"decoder.mid.x"}
    assert identify.part(source([f"model.diffusion_model.{FLUX[0]}"]), "vae") is None
    assert set(identify.part(source([f"first_stage_model.{T5}"]), "vae").entries) == {T5}
    for wrapped in ("transformer.", "module.", "_orig_mod.", "diffusion_model."):
        assert set(identify.part(source([wrapped + name for name in FLUX]), "transformer").entries) == set(FLUX)


def test_names_that_would_hide_one_another():
    twice = source([f"model.diffusion_model.{FLUX[0]}", FLUX[0]])
    assert len(identify.part(twice, "transformer").faults) == 1
    with pytest.raises(UserError, match="twice"):
        identify.part(source(["vae.a", "first_stage_model.a"]), "vae")
    left_over = source([*(f"model.diffusion_model.{name}" for name in FLUX), "something.else"])
    assert "something.else" in identify.part(left_over, "transformer").entries


@pytest.mark.parametrize("model", [dev, schnell, nano])
@pytest.mark.parametrize("layout", ["diffusers", "BFL"])
def test_the_numbers_of_a_transformer_from_its_shapes(model, layout):
    full = model().transformer
    shallow = dataclasses.replace(
        full, hidden_size=full.head_dim, num_heads=1, num_double_blocks=2, num_single_blocks=3
    )
    tensors = published.diffusers_transformer(shallow)
    if layout == "BFL":
        tensors = published.bfl_transformer(tensors, shallow)
    found = Source("file", {name: Entry("BF16", value.shape) for name, value in tensors.items()})
    assert identify.transformer_of(identify.take(found, "transformer")) == shallow
    config = dataclasses.replace(dev(), transformer=shallow)
    assert map_weights("transformer", config, found).faults == []


def test_shapes_that_do_not_say_enough(snapshot_message):
    with snapshot_message.raises(UserError, "--config"):
        identify.transformer_of(source(FLUX))
    names = source(
        [*FLUX, "double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.99999999999.img_mod.lin.weight"]
    )
    for shape in ((0,), (7,), (128, 1), ()):
        names.entries["double_blocks.0.img_attn.norm.query_norm.scale"] = Entry("BF16", shape)
        with pytest.raises(UserError):
            identify.transformer_of(names)
