"""FluxPipeline: the same seed is the same picture, nothing is compiled twice, and wrong input is one sentence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.errors import UserError
from flux_jax.sampling import schedule
from flux_jax.sampling.pipeline import FluxPipeline

COMPILATIONS: list[str] = []


def note_compilation(event: str, duration: float, **about) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS.append(about.get("fun_name", "?"))


jax.monitoring.register_event_duration_secs_listener(note_compilation)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> FluxPipeline:
    config = tiny_model.config()
    words = tiny_model.tokenizers(tmp_path_factory.mktemp("tokenizers"), config)
    return FluxPipeline(config, tokenizers=Tokenizers.load(words, config), **tiny_model.modules(config))


@pytest.fixture(scope="module")
def alone(pipe) -> np.ndarray:
    """The picture that the others are compared with: float32 [h, w, 3]."""
    return pipe("a red circle", seed=7, output_type="np").images[0]


def test_picture(pipe, alone):
    config = pipe.config.sampling
    assert alone.shape == (config.height, config.width, 3)
    assert alone.dtype == np.float32
    assert alone.min() >= 0
    assert alone.max() <= 1
    assert alone.std() > 0.01
    out = pipe("a red circle", seed=7)
    np.testing.assert_array_equal(np.asarray(out.images[0]), (alone * 255).round().astype(np.uint8))
    assert out.seeds == [7]
    assert set(out.timings) == {"compile", "text", "denoise", "decode", "steps"}
    assert out.timings["steps"] == config.num_inference_steps


def test_second_call_compiles_nothing(pipe, alone):
    pipe("a red circle", seed=7, num_images_per_prompt=2)
    COMPILATIONS.clear()
    pipe(["a blue square", "two green circles"], seed=123, guidance_scale=1.25, num_images_per_prompt=3)
    assert COMPILATIONS == []
    jax.jit(lambda x: x + 1)(np.float32(1))
    assert len(COMPILATIONS) == 1, "the count above means nothing if compilations are not seen"


def test_weights_are_arguments(pipe, alone):
    other = FluxPipeline(pipe.config, tokenizers=pipe.tokenizers, **tiny_model.modules(pipe.config, seed=1))
    COMPILATIONS.clear()
    image = other("a red circle", seed=7, output_type="np").images[0]
    assert COMPILATIONS == []
    assert np.abs(image - alone).max() > 0.01


def test_same_seed_same_picture_in_any_batch(pipe, alone):
    batch = pipe(["a blue square", "a red circle", "a green triangle"], seed=6, output_type="np")
    assert batch.seeds == [6, 7, 8]
    np.testing.assert_array_equal(batch.images[1], alone)
    several = pipe("a red circle", seed=5, num_images_per_prompt=4, output_type="np")
    np.testing.assert_array_equal(several.images[2], alone)
    assert np.abs(several.images[1] - alone).max() > 0.01
    assert np.abs(batch.images[0] - alone).max() > 0.01


@pytest.mark.parametrize(
    ("dtype", "true_cfg"),
    [
        (jnp.float32, 1.0),
        pytest.param(jnp.float32, 3.0, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 1.0, marks=pytest.mark.slow),
    ],
)
def test_steps_driven_from_outside_give_the_same_bits(pipe, dtype, true_cfg):
    if dtype == jnp.bfloat16:
        parts = {part: jax.tree.map(lambda p: p.astype(dtype), getattr(pipe, part)) for part in tiny_model.COMPONENTS}
        pipe = FluxPipeline(pipe.config, tokenizers=pipe.tokenizers, dtype=dtype, **parts)
    options = {"seed": 7, "true_cfg_scale": true_cfg, "output_type": "latent"}
    inside = pipe("a red circle", **options).images
    seen = []

    def listen(pipe, step, timestep, tensors):
        seen.append((step, timestep, {name: np.asarray(value) for name, value in tensors.items()}))

    COMPILATIONS.clear()
    outside = pipe("a red circle", **options, callback_on_step_end=listen).images
    assert sum("step" in name for name in COMPILATIONS) <= 1
    np.testing.assert_array_equal(outside, inside)
    assert np.isfinite(inside).all()
    steps = pipe.config.sampling.num_inference_steps
    assert [step for step, _, _ in seen] == list(range(steps))
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert seen[0][1] == 1000
    np.testing.assert_array_equal(seen[-1][2]["latents"], inside)
    np.testing.assert_allclose(seen[-1][2]["denoised"], inside, atol=1e-5)  # the last step ends at sigma 0


def test_stream_gives_each_step_of_each_picture(pipe, alone):
    config = pipe.config.sampling
    steps = list(pipe.stream(["a blue square", "a red circle"], seed=6))
    assert [(step.image, step.index) for step in steps] == [(i, k) for i in (0, 1) for k in range(3)]
    assert {step.count for step in steps} == {config.num_inference_steps}
    assert [step.sigma for step in steps[:2]] == [step.sigma_before for step in steps[1:3]]
    assert (steps[0].sigma_before, steps[2].sigma) == (1, 0)
    [image] = pipe.decode(steps[-1].latents, output_type="np")
    np.testing.assert_array_equal(image, alone)
    np.testing.assert_allclose(steps[-1].denoised, steps[-1].latents, atol=1e-5)
    [preview] = pipe.decode(steps[-2].denoised)
    assert preview.size == (config.width, config.height)


def test_who_leaves_a_stream_computes_no_further_step(pipe, monkeypatch):
    from flux_jax.sampling import programs

    called, step = [], programs.step

    class Counted:
        def __call__(self, *args):
            called.append(1)
            return step(*args)

    monkeypatch.setattr(programs, "step", Counted())
    for found in pipe.stream("a red circle", seed=7):
        if found.index == 1:
            break
    assert len(called) == 2


def test_a_stream_goes_on_from_latents_that_are_sent(pipe, alone):
    steps = pipe.stream("a red circle", seed=7)
    first = next(steps)
    steps.send(first.latents)  # the same: nothing changes
    np.testing.assert_array_equal(pipe.decode(next(steps).latents, output_type="np")[0], alone)
    steps = pipe.stream("a red circle", seed=7)
    next(steps)
    steps.send(np.zeros_like(first.latents))
    assert np.abs(pipe.decode(next(steps).latents, output_type="np")[0] - alone).max() > 1e-3


def test_latents_of_another_size_are_not_decoded(pipe, snapshot_message):
    with snapshot_message.raises(UserError, "height"):
        pipe.decode(np.zeros((1, 9, 64), np.float32))


def test_interrupt_and_replaced_latents(pipe):
    shape = (1, 8, 64)

    def stop(pipe, step, timestep, tensors):
        pipe.interrupt = step == 1
        return {"latents": np.full(shape, 0.25)}

    out = pipe(["a red circle", "a blue square"], seed=7, output_type="latent", callback_on_step_end=stop)
    assert out.timings["steps"] == 2
    assert out.seeds == [7]
    np.testing.assert_array_equal(out.images, np.full(shape, 0.25, np.float32))


def test_embeddings_and_noise_as_input(pipe, alone, snapshot_message):
    text, pooled = pipe.encode_prompt("a red circle")
    fresh = FluxPipeline(pipe.config, transformer=pipe.transformer, vae=pipe.vae)
    embeds = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    np.testing.assert_array_equal(fresh(**embeds, seed=7, output_type="np").images[0], alone)
    noise = np.asarray(schedule.pack_latents(schedule.initial_noise(7, 4, 8, 16)[None]))
    kept = noise.copy()
    np.testing.assert_array_equal(fresh(**embeds, latents=noise, output_type="np").images[0], alone)
    np.testing.assert_array_equal(noise, kept)  # the program takes over the memory of a copy
    with snapshot_message.raises(UserError, "encoders"):
        fresh("a red circle")


def test_free_encoders(pipe, alone, snapshot_message):
    other = FluxPipeline(
        pipe.config, transformer=pipe.transformer, vae=pipe.vae, t5=pipe.t5, clip=pipe.clip, tokenizers=pipe.tokenizers
    )
    other("a red circle", seed=1)
    other.free_encoders()
    assert other.t5 is None
    assert other.clip is None
    np.testing.assert_array_equal(other("a red circle", seed=7, output_type="np").images[0], alone)
    with snapshot_message.raises(UserError, "encoders"):
        other("a blue square")


def test_negative_prompt(pipe, alone):
    with pytest.warns(UserWarning, match="no effect"):
        same = pipe("a red circle", seed=7, negative_prompt="a blue square", output_type="np").images[0]
    np.testing.assert_array_equal(same, alone)
    steered = [
        pipe("a red circle", seed=7, negative_prompt=negative, true_cfg_scale=3.0, output_type="np").images[0]
        for negative in ("a blue square", "", None)
    ]
    assert np.abs(steered[0] - alone).max() > 1e-3
    assert np.abs(steered[0] - steered[1]).max() > 1e-3
    np.testing.assert_array_equal(steered[1], steered[2])


def test_guidance_has_an_effect_only_where_it_is_embedded(pipe, alone):
    weaker = pipe("a red circle", seed=7, guidance_scale=1.0, output_type="np").images[0]
    assert np.abs(weaker - alone).max() > 1e-3
    config = tiny_model.schnell_config()
    parts = tiny_model.modules(config)
    schnell = FluxPipeline(config, tokenizers=pipe.tokenizers, **parts)
    one, two = (schnell("a red circle", seed=7, guidance_scale=g, output_type="np").images for g in (0.0, 5.0))
    np.testing.assert_array_equal(one, two)


def test_size_is_rounded_and_said(pipe):
    with pytest.warns(UserWarning, match="height 30 is not a multiple of 16; using 32"):
        out = pipe("a red circle", height=30, seed=7)
    assert out.images[0].size == (64, 32)


def test_long_prompt_is_said(pipe):
    with pytest.warns(UserWarning, match="is left out"):
        pipe("a red circle and a blue square and a green triangle and two three four", seed=7)


def test_unseeded_calls_differ_and_can_be_repeated(pipe):
    first, second = (pipe("a red circle", output_type="np") for _ in range(2))
    assert first.seeds != second.seeds
    again = pipe("a red circle", seed=second.seeds[0], output_type="np")
    np.testing.assert_array_equal(again.images, second.images)


@pytest.mark.parametrize("driven", [False, True])
def test_nan_names_the_step(pipe, driven, snapshot_message):
    parts = {part: getattr(pipe, part) for part in tiny_model.COMPONENTS}
    broken = jax.tree.map(lambda p: p, parts["transformer"])
    broken.final_layer.linear.bias[...] = jnp.full_like(broken.final_layer.linear.bias[...], jnp.nan)
    bad = FluxPipeline(pipe.config, tokenizers=pipe.tokenizers, **{**parts, "transformer": broken})
    callback = (lambda *_: None) if driven else None
    with snapshot_message.raises(UserError, "Step 1 of 3", "seed 7") as error:
        bad("a red circle", seed=7, callback_on_step_end=callback)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_picture_of_no_numbers_is_no_black_one(pipe, value, snapshot_message):
    latents = np.zeros((1, 8, 64), np.float32)
    broken = jax.tree.map(lambda p: p, pipe.vae)
    broken.decoder.conv_out.bias[...] = broken.decoder.conv_out.bias[...].at[0].set(value)
    bad = FluxPipeline(pipe.config, transformer=pipe.transformer, vae=broken)
    with snapshot_message.raises(UserError, "VAE", "finite") as error:
        bad.decode(latents)
    assert error.value.exit_code == 2
    with snapshot_message.raises(UserError, "latents"):  # another cause, another sentence
        pipe.decode(np.full_like(latents, value))


def test_parts_of_two_models_are_refused_before_they_are_read(tiny_checkpoint, monkeypatch, snapshot_message):
    stored = Checkpoint.open(tiny_checkpoint)
    stored.config = dataclasses.replace(stored.config, t5=dataclasses.replace(stored.config.t5, d_model=32))
    monkeypatch.setattr(stored, "load", lambda *_, **__: pytest.fail("was read"))
    with snapshot_message.raises(UserError, 32, 24, "T5"):
        FluxPipeline.from_checkpoint(stored)


def test_what_clip_leaves_out_is_said_once(pipe):
    """T5 takes 64 tokens here, CLIP 16; a prompt that neither takes has T5's notice alone."""
    prompts = [f"a red circle to the left of a blue square and two {each} squares" for each in ("red", "green")]
    quiet = FluxPipeline(pipe.config, **{name: getattr(pipe, name) for name in (*tiny_model.COMPONENTS, "tokenizers")})
    with pytest.warns(UserWarning, match="^CLIP") as told:
        quiet.encode_prompt(prompts[0], 64)
    assert len(told) == 1
    quiet.encode_prompt(prompts[1], 64)  # a warning would be an error
    with pytest.warns(UserWarning, match="^The prompt has") as told:
        quiet.encode_prompt(prompts[0], 12)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  \n"}, "prompt"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": None}, "prompt_embeds"),
        ({"prompt_embeds": np.zeros((1, 4, 24), np.float32)}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 4, 24), np.float32)}, "pooled_prompt_embeds"),
        (
            {
                "prompt": None,
                "prompt_embeds": np.zeros((1, 4, 24), np.float32),
                "pooled_prompt_embeds": np.zeros((1, 9), np.float32),
            },
            "[b, t, 24]",
        ),
        ({"height": 0}, "height"),
        ({"width": -16}, "width"),
        ({"height": 20_000}, "height"),
        ({"height": 16_384, "width": 16_384}, "65536"),
        ({"num_inference_steps": 0}, "0"),
        ({"guidance_scale": float("nan")}, "nan"),
        ({"guidance_scale": -1.0}, "-1.0"),
        ({"true_cfg_scale": 0.5}, "0.5"),
        ({"seed": -1}, "-1"),
        ({"seed": 2**32}, "4294967296"),
        ({"seed": 2**32 - 1, "num_images_per_prompt": 2}, "4294967296"),
        ({"num_images_per_prompt": 0}, "0"),
        ({"max_sequence_length": 13}, "13"),
        ({"output_type": "tensor"}, "output_type"),
        ({"latents": np.zeros((1, 9, 64), np.float32)}, "[1, 8, 64]"),
        ({"negative_prompt": ["a", "b"], "true_cfg_scale": 2.0}, "2 negative"),
    ],
)
def test_bad_input_is_one_sentence(pipe, arguments, named, snapshot_message):
    with snapshot_message.raises(UserError, named) as error:
        pipe(**{"prompt": "a red circle", "seed": 7, **arguments})
    assert error.value.exit_code == 2
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_from_pretrained(alone, tiny_checkpoint):
    loaded = FluxPipeline.from_pretrained(tiny_checkpoint)
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded("a red circle", seed=7, output_type="np").images[0], alone)
    assert FluxPipeline.from_pretrained(tiny_checkpoint, dtype=jnp.bfloat16).dtype == jnp.bfloat16
