"""From prompts to pictures: `FluxPipeline` holds the components of a model and runs the programs of
`flux_jax.sampling.programs` in order.

In: prompts (or text [b, t, d] and pooled [b, p]), a size in pixels, seeds (or noise [b, i, c]). Out: pictures, the
seed behind each, and where the time went. Names of arguments are those of diffusers' FluxPipeline, so that code ports
by changing an import.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from flux_jax import validation
from flux_jax.checkpoints.checkpoint import DEFAULT_MODEL, Checkpoint
from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.config import FluxConfig, TransformerConfig
from flux_jax.errors import UserError
from flux_jax.io import png
from flux_jax.models.params import COMPONENTS
from flux_jax.runtime import memory
from flux_jax.runtime.environment import resolve_dtype
from flux_jax.sampling import programs, schedule, tensor_parallel
from flux_jax.sampling.executor import StageExecutor
from flux_jax.sampling.offload import host

Callback = Callable[["FluxPipeline", int, float, dict[str, np.ndarray]], dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Output:
    """`images`: list of PIL images, or float32 [b, h, w, 3] in [0, 1] ("np"), or latents float32 [b, i, c] ("latent").
    `seeds`: one for each. `timings`: seconds by stage (compile, text, denoise, decode), and the `steps` run."""

    images: Any
    seeds: list[int]
    timings: dict[str, float]


class FluxPipeline:
    """A text-to-image model. Build it with `from_pretrained`, or from modules of `flux_jax.models`."""

    def __init__(
        self,
        config: FluxConfig,
        *,
        transformer: nnx.Module,
        vae: nnx.Module,
        t5: nnx.Module | None = None,
        clip: nnx.Module | None = None,
        tokenizers: Tokenizers | None = None,
        dtype: Any = jnp.float32,
        offload: str = "none",
        vae_tiling: str = "auto",
        mesh: Mesh | None = None,
    ):
        """offload: a mode of `flux_jax.sampling.offload`, for modules that lie on the host. vae_tiling: as in
        `StageExecutor`. mesh: of a transformer that `flux_jax.sampling.tensor_parallel` loaded."""
        self.spread = None if mesh is None else tensor_parallel.ShardedSampler(transformer, mesh)
        self.offload, self.vae_tiling = offload, vae_tiling
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.transformer, self.vae, self.t5, self.clip, self.tokenizers = transformer, vae, t5, clip, tokenizers
        self.interrupt = False  # set from a callback: the picture stops where it is, later ones are left out
        self._encoded: dict[tuple[str, int], tuple[jax.Array, jax.Array]] = {}

    @classmethod
    def from_pretrained(
        cls,
        path_or_alias: str | Path = DEFAULT_MODEL,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        offload: str = "none",
        vae_tiling: str = "auto",
        activations: str | None = None,
    ) -> "FluxPipeline":
        """A checkpoint's folder, or an alias of `flux_jax.checkpoints.checkpoint`. dtype: of weights and activations;
        "auto" is bfloat16 on a GPU and float32 on a CPU, where it is both faster and exact. mesh: the transformer is
        split over it, see `flux_jax.sampling.tensor_parallel`; other components are on one device of each process.
        offload, vae_tiling: how to save the device's memory, see `__init__`. activations: what ternary weights are
        multiplied with, "bf16" (the activations as they are) or "int8"; None: as the checkpoint says. Raises UserError
        for what is no readable checkpoint, or has no ternary weights to choose activations for, and where the device is
        too small for it."""
        stored, dtype = Checkpoint.open(path_or_alias).using(activations), resolve_dtype(dtype)
        if stored.quantization is not None and not stored.quantization["distilled"]:
            warnings.warn(f"The weights of {path_or_alias} were rounded, not distilled: expect noise.", stacklevel=2)
        tokenizers = Tokenizers.load(stored.tokenizers, stored.config)
        place, components = None if offload == "none" else host(), {}
        for component in COMPONENTS:
            try:
                if component == "transformer" and mesh is not None:
                    components[component] = tensor_parallel.load(stored, mesh, dtype)
                else:
                    components[component] = stored.load(component, dtype=dtype, sharding=place)
            except (MemoryError, RuntimeError) as error:
                if not memory.is_exhausted(error):
                    raise
                flags = ["--offload layers"] if offload == "none" else []
                raise memory.exhausted(f"loading the {component}", flags) from error
        memory_flags = {"offload": offload, "vae_tiling": vae_tiling}
        return cls(stored.config, tokenizers=tokenizers, dtype=dtype, mesh=mesh, **memory_flags, **components)

    def free_encoders(self) -> None:
        """Drops T5 and CLIP from memory. Prompts of the last call, and embeddings given as arguments, still work."""
        self.t5 = self.clip = None

    def encode_prompt(self, prompt: str, max_sequence_length: int | None = None) -> tuple[jax.Array, jax.Array]:
        """text [1, t, d] and pooled [1, p] of one prompt; UserError when it is needed and the encoders were freed."""
        length = max_sequence_length or self.config.sampling.max_sequence_length
        return self._encode(StageExecutor(self.offload, self.vae_tiling), [prompt], length)[0]

    def _encode(self, stages: StageExecutor, prompts: list[str], length: int) -> list[tuple[jax.Array, jax.Array]]:
        """(text [1, t, d], pooled [1, p]) of each prompt; those of the last call are not computed again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, length) not in self._encoded]
        known = {prompt: self._encoded[prompt, length] for prompt in prompts if prompt not in new}
        if new:
            if self.t5 is None or self.clip is None or self.tokenizers is None:
                raise UserError(
                    "The text encoders were freed; pass prompt_embeds and pooled_prompt_embeds, or load the model anew."
                )
            for prompt in new:
                if notice := self.tokenizers.truncation_warning(prompt, length):
                    warnings.warn(notice, stacklevel=5)
            t5_ids = [self.tokenizers.t5([prompt], length) for prompt in new]
            clip_ids = [self.tokenizers.clip([prompt]) for prompt in new]
            pairs = stages.encode(self.t5, self.clip, t5_ids, clip_ids)
            known |= dict(zip(new, pairs, strict=True))
        return [known[prompt] for prompt in prompts]

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: int | float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: int | float = 1.0,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> Output:
        """Draws `num_images_per_prompt` pictures of each prompt; what is None is the model's own default.

        seed: picture i of the call uses seed + i, alone or in any batch (None: drawn at random); a list has the seed
        of each. latents: noise
        float32 [b, i, c] instead of it. prompt_embeds [b, t, d] with pooled_prompt_embeds [b, p]: instead of prompts.
        true_cfg_scale above 1: classifier-free guidance against `negative_prompt` ("" where None), at twice the time.
        callback_on_step_end(pipe, step, timestep in (0, 1000], {"latents", "denoised"}: numpy float32 [1, i, c]) runs
        after each step of each picture; it may return {"latents": ...} to go on from, or set `pipe.interrupt`.
        Raises UserError for input that cannot be drawn, and for latents that stop being finite.
        """
        stages, defaults = StageExecutor(self.offload, self.vae_tiling), self.config.sampling
        guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
        height, width, steps, length = (
            default if value is None else value
            for value, default in (
                (height, defaults.height),
                (width, defaults.width),
                (num_inference_steps, defaults.num_inference_steps),
                (max_sequence_length, defaults.max_sequence_length),
            )
        )
        validation.check_numbers(
            self.config, steps=steps, guidance=guidance, true_cfg=true_cfg_scale, max_sequence_length=length
        )
        height, width, notices = validation.fit_size(self.config, height, width)
        for notice in notices:
            warnings.warn(notice, stacklevel=2)
        if output_type not in ("pil", "np", "latent"):
            raise UserError(f'output_type must be "pil", "np" or "latent", not {output_type!r}.')
        self.interrupt = False

        conditions = self._conditions(
            stages, prompt, prompt_embeds, pooled_prompt_embeds, negative_prompt, true_cfg_scale, length
        )
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt must be at least 1, not {num_images_per_prompt}.")
        conditions = [c for c in conditions for _ in range(num_images_per_prompt)]
        seeds = validation.seeds_of(seed, len(conditions))

        rows, columns = height // self.config.pixels_per_token, width // self.config.pixels_per_token
        noise = self._given_noise(latents, len(conditions), rows, columns)
        sigmas = schedule.sigmas(defaults, steps, rows * columns)
        if noise is None:
            size = rows, columns, self.config.vae.latent_channels
            noise = [stages.run("denoise", programs.noise, np.uint32(each), *size) for each in seeds]
        scales = jnp.asarray(guidance, jnp.float32), jnp.asarray(true_cfg_scale, jnp.float32)
        steering = [
            programs.Conditions(text, pooled, *scales, self._rope(rows, columns, text.shape[1]))
            for text, pooled in conditions
        ]
        drawn = self._draw(stages, noise, sigmas, steering, callback_on_step_end, seeds)
        if output_type != "latent":
            drawn = stages.decode(self.vae, drawn, rows, columns)
        stacked = np.stack(drawn)
        if output_type == "pil":
            stacked = png.to_pil((stacked * 255).round().astype(np.uint8))
        return Output(stacked, seeds[: len(drawn)], stages.seconds)

    def _conditions(
        self, stages, prompt, embeds, pooled, negative, true_cfg, length
    ) -> list[tuple[jax.Array, jax.Array]]:
        """(text [k, t, d], pooled [k, p]) for each prompt, encoding each distinct one once."""
        if (prompt is None) == (embeds is None) or (embeds is None) != (pooled is None):
            raise UserError("Pass either a prompt, or both prompt_embeds and pooled_prompt_embeds.")
        if negative is not None and true_cfg == 1:
            warnings.warn("negative_prompt has no effect while true_cfg_scale is 1; try 3 (2x slower).", stacklevel=3)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        count = len(prompts) if embeds is None else len(embeds)
        negatives = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
        if len(negatives) != count or count == 0:
            raise UserError(
                f"{count} prompts and {len(negatives)} negative prompts; pass one for each, or one for all."
            )
        wanted = [validation.check_prompt(p) for p in prompts] + (negatives if true_cfg > 1 else [])
        encoded = self._encode(stages, wanted, length)
        self._encoded = {(p, length): pair for p, pair in zip(wanted, encoded, strict=True)}
        if embeds is None:
            pairs = [self._encoded[p, length] for p in prompts]
        else:
            texts, pools = jnp.asarray(embeds, self.dtype), jnp.asarray(pooled, self.dtype)
            dims = self.config.transformer
            if texts.ndim != 3 or pools.shape != (count, dims.pooled_dim) or texts.shape[2] != dims.text_dim:
                raise UserError(
                    f"prompt_embeds must be [b, t, {dims.text_dim}] and pooled_prompt_embeds [b, {dims.pooled_dim}], "
                    f"not {list(texts.shape)} and {list(pools.shape)}."
                )
            pairs = [(texts[i : i + 1], pools[i : i + 1]) for i in range(count)]
        if true_cfg > 1:
            against = [self._encoded[n, length] for n in negatives]
            pairs = [
                (jnp.concatenate([text, no_text]), jnp.concatenate([pool, no_pool]))
                for (text, pool), (no_text, no_pool) in zip(pairs, against, strict=True)
            ]
        return pairs

    def _draw(
        self, stages: StageExecutor, noise, sigmas, steering, callback: Callback | None, seeds: list[int]
    ) -> list[Any]:
        """Latents [i, c] of each picture, up to an interruption: one after the other, or as many as the mesh takes."""
        drawn: list[Any] = []
        if self.spread is None:
            transformer = stages.lend(self.transformer)
            for x, conditions, seed in zip(noise, steering, seeds, strict=True):
                drawn.append(self._denoise(stages, transformer, x, sigmas, conditions, callback, seed))
                if self.interrupt:
                    break
            return drawn
        if callback is not None:
            raise UserError("callback_on_step_end needs a model on one device; leave out the mesh.")
        steps, width = len(sigmas) - 1, self.spread.width
        for i in range(0, len(seeds), width):
            group = slice(i, i + width)
            latents, finite = self.spread.draw(stages.run, noise[group], sigmas, steering[group])
            stages.seconds["steps"] += steps
            for each, seed in zip(finite, seeds[group], strict=True):
                if not each.all():
                    self._not_finite(int(each.argmin()), steps, seed)
            drawn += latents
        return drawn

    def _denoise(self, stages, transformer, x, sigmas, conditions, callback: Callback | None, seed: int) -> jax.Array:
        """Noise [i, c] -> latents [i, c]: one program, or the same step driven from here when somebody listens."""
        steps = len(sigmas) - 1
        if callback is None:
            x, finite = stages.run("denoise", programs.denoise, transformer, x, sigmas, conditions)
            stages.seconds["steps"] += steps
            if not (finite := np.asarray(finite)).all():
                self._not_finite(int(finite.argmin()), steps, seed)
            return x
        modulation = stages.run("denoise", programs.modulations, transformer, sigmas, conditions)
        # Where the step's result will lie: arrays that are placed otherwise would compile the step a second time.
        place = replicated(transformer)
        x = jax.device_put(x, place)
        for i in range(steps):
            x, denoised, finite = stages.run(
                "denoise", programs.step, transformer, x, sigmas, conditions, modulation, np.int32(i)
            )
            stages.seconds["steps"] += 1
            if not finite:
                self._not_finite(i, steps, seed)
            # A copy of x: the next step takes over its memory, and the callback may keep what it was given.
            tensors = {"latents": np.array(x)[None], "denoised": np.asarray(denoised)[None]}
            changed = callback(self, i, 1000 * float(sigmas[i]), tensors)
            if changed and "latents" in changed:
                x = jax.device_put(np.array(changed["latents"], np.float32).reshape(x.shape), place)
            if self.interrupt:
                break
        return x

    def _not_finite(self, i: int, steps: int, seed: int):
        hint = (
            "the checkpoint's weights may be damaged"
            if self.dtype == jnp.float32
            else "try dtype float32, or another seed"
        )
        raise UserError(
            f"Step {i + 1} of {steps} gave latents that are not finite (seed {seed}, {self.dtype}); {hint}."
        )

    def _given_noise(self, latents, count: int, rows: int, columns: int) -> np.ndarray | None:
        if latents is None:
            return None
        noise = np.asarray(latents, np.float32)
        shape = (count, rows * columns, self.config.transformer.in_channels)
        if noise.shape != shape:
            raise UserError(
                f"latents must be packed tokens {list(shape)} (pictures, tokens, channels), not {list(noise.shape)}."
            )
        return noise

    def _rope(self, rows: int, columns: int, text_tokens: int) -> jax.Array:
        return _rope(self.config.transformer, rows, columns, text_tokens)


@functools.lru_cache(maxsize=4)
def _rope(config: TransformerConfig, rows: int, columns: int, text_tokens: int) -> jax.Array:
    return jax.device_put(schedule.rope_table(config, rows, columns, text_tokens))


def replicated(module: nnx.Module) -> Sharding:
    """The sharding of an array that lies whole on every device that the module's weights lie on."""
    sharding = jax.tree.leaves(module)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
