"""What a call draws: arguments in diffusers' names become a request with every number decided, checked once.

In: prompts or their embeddings, a size in pixels, steps, guidance, seeds or noise; what is None is the model's own
default. Out: `SamplingRequest`, or a UserError of one sentence. Nothing here computes on a device.
"""

import dataclasses
from typing import Any

import numpy as np

from flux_jax import validation
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError, shortened


@dataclasses.dataclass(frozen=True)
class SamplingRequest:
    """Images that differ in prompt and seed only; each tuple has an entry for each image. height and width in pixels.

    negative_prompts: with true_cfg above 1, "" where there is none. embeddings: (text [p, t, d], pooled [p, d]) of p
    prompts in place of these, each for as many images in a row; latents: noise float32 [b, i, c] in place of what the
    seeds give. notices: sentences for the user about what was changed or has no effect.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    steps: int
    guidance: float
    true_cfg: float
    max_sequence_length: int
    negative_prompts: tuple[str, ...] = ()
    embeddings: tuple[Any, Any] | None = None
    latents: np.ndarray | None = None
    notices: tuple[str, ...] = ()

    @classmethod
    def checked(
        cls,
        config: FluxConfig,
        *,
        prompt: Any = None,
        height: Any = None,
        width: Any = None,
        num_inference_steps: Any = None,
        guidance_scale: Any = None,
        num_images_per_prompt: Any = 1,
        seed: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt: Any = None,
        true_cfg_scale: Any = 1.0,
        max_sequence_length: Any = None,
    ) -> "SamplingRequest":
        """The request of `FluxPipeline.__call__`'s arguments, which describes them; numbers may be numpy's. UserError
        for what cannot be drawn, whatever its type."""
        defaults = config.sampling
        steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
        length = defaults.max_sequence_length if max_sequence_length is None else max_sequence_length
        validation.check_numbers(
            config, steps=steps, guidance=guidance, true_cfg=true_cfg_scale, max_sequence_length=length
        )
        height, width, notices = validation.fit_size(
            config, defaults.height if height is None else height, defaults.width if width is None else width
        )
        if (prompt is None) == (prompt_embeds is None) or (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise UserError("Pass either a prompt, or both prompt_embeds and pooled_prompt_embeds.")
        prompts = _texts(prompt)
        embeddings = None if prompt_embeds is None else _embeddings(config, prompt_embeds, pooled_prompt_embeds)
        count = len(prompts) if embeddings is None else len(embeddings[0])
        one = negative_prompt is None or isinstance(negative_prompt, str)
        negatives = [negative_prompt or ""] * count if one else _texts(negative_prompt)
        if len(negatives) != count or count == 0:
            raise UserError(
                f"{count} prompts and {len(negatives)} negative prompts; pass one for each, or one for all."
            )
        if negative_prompt is not None and true_cfg_scale == 1:
            notices.append("negative_prompt has no effect while true_cfg_scale is 1; try 3 (2x slower).")
        if not validation.is_whole(num_images_per_prompt, 1, validation.MAX_PICTURES):
            raise UserError(
                f"num_images_per_prompt must be from 1 to {validation.MAX_PICTURES}, "
                f"not {shortened(num_images_per_prompt)}."
            )
        prompts = [validation.check_prompt(each) for each in prompts]
        negatives = [validation.check_text(each, "negative prompt") for each in negatives]
        seeds = validation.seeds_of(seed, count * num_images_per_prompt)
        tokens = height * width // config.pixels_per_token**2
        return cls(
            prompts=tuple(each for each in prompts for _ in range(num_images_per_prompt)),
            seeds=tuple(seeds),
            height=height,
            width=width,
            steps=int(steps),
            guidance=float(guidance),
            true_cfg=float(true_cfg_scale),
            max_sequence_length=int(length),
            negative_prompts=tuple(each for each in negatives for _ in range(num_images_per_prompt))
            if true_cfg_scale > 1
            else (),
            embeddings=embeddings,
            latents=None if latents is None else _noise(config, latents, len(seeds), tokens),
            notices=tuple(notices),
        )


def _texts(given: Any) -> list[Any]:
    """One text, several, or none (None), as a list."""
    if given is None or isinstance(given, str):
        return [] if given is None else [given]
    if (texts := validation.listed(given)) is None:
        raise UserError(f"A prompt must be text, or a list of texts, not {shortened(given)}.")
    return texts


def _embeddings(config: FluxConfig, text: Any, pooled: Any) -> tuple[Any, Any]:
    """(text [b, t, d], pooled [b, p]) of the prompts, checked."""
    arrays = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    text, pooled = (each if hasattr(each, "ndim") else _numbers(each, name) for name, each in arrays.items())
    dims = config.transformer
    if text.ndim != 3 or pooled.shape != (len(text), dims.pooled_dim) or text.shape[2] != dims.text_dim:
        raise UserError(
            f"prompt_embeds must be [b, t, {dims.text_dim}] and pooled_prompt_embeds [b, {dims.pooled_dim}], "
            f"not {list(text.shape)} and {list(pooled.shape)}."
        )
    return text, pooled


def _noise(config: FluxConfig, latents: Any, images: int, tokens: int) -> np.ndarray:
    noise, shape = _numbers(latents, "latents"), (images, tokens, config.transformer.in_channels)
    if noise.shape != shape:
        raise UserError(
            f"latents must be packed tokens {list(shape)} (pictures, tokens, channels), not {list(noise.shape)}."
        )
    return noise


def _numbers(given: Any, name: str) -> np.ndarray:
    """What numpy takes for numbers, as float32."""
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} must be an array of numbers, not {shortened(given)}.") from error
