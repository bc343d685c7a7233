"""Folders that diffusers writes are read, folders written for diffusers are loaded by it, and both sides draw one
picture.
"""

import dataclasses

import numpy as np
import pytest
import torch_reference as reference
from published import load_module

from convert.__main__ import main
from flux_jax.checkpoints.checkpoint import Checkpoint, resolve
from flux_jax.models.params import COMPONENTS, leaves
from flux_jax.sampling.pipeline import FluxPipeline

pytestmark = pytest.mark.reference
LATENTS = 1e-3  # max abs error of the final latents, over four steps in float32, relative to their largest value
PIXELS = 0.999  # of the uint8 values within 1


@pytest.mark.parametrize(
    ("guidance", "shard_bytes"), [(True, 200_000), pytest.param(False, None, marks=pytest.mark.slow)]
)
def test_a_folder_that_diffusers_wrote(tmp_path, guidance, shard_bytes):
    config = reference.tiny(guidance)
    pipe = reference.save_pipeline(tmp_path / "source", config, shard_bytes=shard_bytes)
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--dtype", "float32", "-q"]) == 0
    opened = Checkpoint.open(tmp_path / "out")
    assert opened.config == dataclasses.replace(config, name="source")
    modules = {"transformer": pipe.transformer, "t5": pipe.text_encoder_2, "clip": pipe.text_encoder, "vae": pipe.vae}
    for part in COMPONENTS:
        wanted = load_module(part, config, reference.state_dict_numpy(modules[part]))
        stored = opened.read(part, opened.table(part))
        assert all(np.array_equal(stored[name], value) for name, value in leaves(wanted))


@pytest.mark.parametrize("guidance", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_folder_written_for_diffusers(tmp_path, guidance):
    pipe = reference.save_pipeline(tmp_path / "source", reference.tiny(guidance))
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--dtype", "float32", "-q"]) == 0
    assert main(["--to", "diffusers", str(tmp_path / "out"), str(tmp_path / "back"), "-q"]) == 0
    back = reference.load_pipeline(tmp_path / "back")
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        one, other = (reference.state_dict_numpy(getattr(p, name)) for p in (pipe, back))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    for name in ("tokenizer", "tokenizer_2"):
        prompts = ["a red cat, two dogs!", ""]
        assert getattr(pipe, name)(prompts)["input_ids"] == getattr(back, name)(prompts)["input_ids"]
    for key in ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        assert pipe.scheduler.config[key] == back.scheduler.config[key]


@pytest.mark.parametrize("model", ["tiny", pytest.param("nano-bf16", marks=pytest.mark.slow)])
def test_diffusers_draws_our_picture(tiny_published_checkpoint, tmp_path, model):
    source = tiny_published_checkpoint if model == "tiny" else resolve(model)
    assert main(["--to", "diffusers", str(source), str(tmp_path / "folder"), "-q"]) == 0
    ours, theirs = FluxPipeline.from_pretrained(source, dtype="float32"), reference.load_pipeline(tmp_path / "folder")
    defaults, prompt, steps = ours.config.sampling, "a red circle to the left of a blue square", 4
    height, width = defaults.height, defaults.width
    tokens = height * width // ours.config.pixels_per_token**2
    noise = np.random.default_rng(0).standard_normal((1, tokens, ours.config.transformer.in_channels), np.float32)
    size = {"height": height, "width": width}
    latents, pictures = reference.run_pipeline(
        theirs, prompt, noise, steps=steps, guidance=3.5, **size, max_sequence_length=defaults.max_sequence_length
    )
    call = {"num_inference_steps": steps, "guidance_scale": 3.5, **size, "latents": noise}
    got = np.asarray(ours(prompt, **call, output_type="latent").images)
    assert np.abs(got - latents).max() <= LATENTS * np.abs(latents).max()
    drawn = np.asarray(ours(prompt, **call, output_type="np").images)
    assert drawn.shape == pictures.shape
    difference = np.abs(np.round(drawn * 255) - np.round(pictures * 255))
    assert (difference <= 1).mean() >= PIXELS
