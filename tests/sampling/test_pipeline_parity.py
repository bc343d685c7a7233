"""The whole way against diffusers: its folder, through our converter, draws what its own FluxPipeline draws."""

import warnings

import numpy as np
import parity
import pytest
import torch_reference as reference

from convert.__main__ import main
from flux_jax.sampling.pipeline import FluxPipeline

pytestmark = pytest.mark.reference
STEPS = 4
SIZE = {"height": 48, "width": 80}  # not square: rows and columns must not be confused
LATENTS = 1e-4  # max abs error of the final latents over their max abs value: float32 rounding through four steps
PIXELS = 1e-3  # share of the uint8 values that may be more than 1 apart
PROMPTS = ["a red cat", "two dogs and a bird"]


@pytest.mark.parametrize(
    "guidance", [pytest.param(True, id="dev"), pytest.param(False, id="schnell", marks=pytest.mark.slow)]
)
def test_same_latents_same_pictures(tmp_path, guidance):
    theirs = reference.save_pipeline(tmp_path / "source", reference.tiny(guidance))
    assert main([str(tmp_path / "source"), str(tmp_path / "model"), "--dtype", "float32", "-q"]) == 0
    ours = FluxPipeline.from_pretrained(tmp_path / "model", dtype="float32")
    noise = np.random.default_rng(0).standard_normal((2, 15, 64), np.float32)

    latents, pictures = reference.run_pipeline(theirs, PROMPTS, noise, steps=STEPS, guidance=2.5, **SIZE)
    call = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": 2.5, "latents": noise, "max_sequence_length": 32}
    case = f"pipeline, {'dev' if guidance else 'schnell'}, {STEPS} steps, final latents"
    parity.check(case, ours(PROMPTS, **call, output_type="latent").images, latents, LATENTS)
    drawn = ours(PROMPTS, **call, output_type="np").images
    close = np.abs(np.round(drawn * 255) - np.round(pictures * 255)) <= 1
    parity.note("pipeline, share of uint8 values more than 1 apart", 1 - close.mean(), PIXELS)
    assert np.round(pictures * 255).std() > 5

    # diffusers counts a negative prompt only beside true_cfg_scale, as we do
    call |= {"negative_prompt": "a green car", "true_cfg_scale": 3.0, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steered = theirs(
            PROMPTS, **{**call, "negative_prompt": ["a green car"] * 2, "latents": reference.tensor(noise)}
        )
    steered = steered.images.numpy()
    parity.check(f"{case}, negative prompt", ours(PROMPTS, **call).images, steered, LATENTS)
    assert np.abs(steered - latents).max() > 0.05
