"""From prompts to pictures: `FluxPipeline` holds the components of a model and runs the programs of
`flux_jax.sampling.programs` in order: encode, prior, sample, decode.

In: prompts (or text [b, t, d] and pooled [b, p]), a size in pixels, seeds (or noise [b, i, c]). Out: pictures, the
seed behind each, and where the time went; or one denoising step after the other. Names of arguments are those of
diffusers' FluxPipeline, so that code ports by changing an import.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

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
from flux_jax.sampling.request import SamplingRequest
from flux_jax.sampling.sampler import Sampler, Step

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
        """offload: one of `validation.OFFLOAD_MODES`, for modules that lie on the host. vae_tiling: as in
        `StageExecutor`. mesh: of a transformer that `flux_jax.sampling.tensor_parallel` loaded."""
        self.sharded = None if mesh is None else tensor_parallel.ShardedSampler(transformer, mesh)
        self.offload, self.vae_tiling = offload, vae_tiling
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.transformer, self.vae, self.t5, self.clip, self.tokenizers = transformer, vae, t5, clip, tokenizers
        self.interrupt = False  # set from a callback: the picture stops where it is, later ones are left out
        self._encoded: dict[tuple[str, int], tuple[jax.Array, jax.Array]] = {}
        self._told_of_clip = False  # that it reads less of a prompt: once, for it is so with every long one

    @classmethod
    def from_pretrained(
        cls, path_or_alias: str | Path = DEFAULT_MODEL, *, activations: str | None = None, **how: Any
    ) -> "FluxPipeline":
        """A checkpoint's folder, or an alias of `flux_jax.checkpoints.checkpoint`. activations: what ternary weights
        are multiplied with, "bf16" (the activations as they are) or "int8"; None: as the checkpoint says. how: dtype,
        mesh, offload and vae_tiling of `from_checkpoint`. Raises UserError for what is no readable checkpoint, or has
        no ternary weights to choose activations for, and where the device is too small for it."""
        return cls.from_checkpoint(Checkpoint.open(path_or_alias).using(activations), **how)

    @classmethod
    def from_checkpoint(
        cls,
        stored: Checkpoint,
        *,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        offload: str = "none",
        vae_tiling: str = "auto",
    ) -> "FluxPipeline":
        """An opened checkpoint's components, loaded. dtype: of weights and activations; "auto" is bfloat16 on a GPU and
        float32 on a CPU, where it is both faster and exact. mesh: the transformer is split over it, see
        `flux_jax.sampling.tensor_parallel`; other components are on one device of each process. offload, vae_tiling:
        how to save the device's memory, see `__init__`. UserError where something is damaged or too large."""
        dtype = resolve_dtype(dtype)
        if mismatches := stored.config.mismatches():
            raise UserError(f"The parts of {stored.directory} do not fit each other: {'; '.join(mismatches)}.")
        if stored.quantization is not None and not stored.quantization["distilled"]:
            warnings.warn(f"The weights of {stored.directory} were rounded, not distilled: expect noise.", stacklevel=3)
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
                remedies = ['offload="layers"'] if offload == "none" else []
                needed = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
                raise memory.exhausted(f"loading the {component}{needed}", remedies) from error
        how = {"dtype": dtype, "mesh": mesh, "offload": offload, "vae_tiling": vae_tiling}
        return cls(stored.config, tokenizers=tokenizers, **how, **components)

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
        of each. latents: noise float32 [b, i, c] instead of it. prompt_embeds [b, t, d] with pooled_prompt_embeds
        [b, p]: instead of prompts. true_cfg_scale above 1: classifier-free guidance against `negative_prompt` ("" where
        None), at twice the time. callback_on_step_end(pipe, step, timestep in (0, 1000], {"latents", "denoised"}: numpy
        float32 [1, i, c]) runs after each step of each picture; it may return {"latents": ...} to go on from, or set
        `pipe.interrupt`. Raises UserError for input that cannot be drawn, and for latents that stop being finite.
        """
        request = SamplingRequest.checked(
            self.config,
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            max_sequence_length=max_sequence_length,
        )
        for notice in request.notices:
            warnings.warn(notice, stacklevel=2)
        return self.draw(request, output_type=output_type, callback_on_step_end=callback_on_step_end)

    def draw(
        self, request: SamplingRequest, *, output_type: str = "pil", callback_on_step_end: Callback | None = None
    ) -> Output:
        """The same for a request that was checked already."""
        if output_type not in ("pil", "np", "latent"):
            raise UserError(f'output_type must be "pil", "np" or "latent", not {output_type!r}.')
        self.interrupt = False
        executor = StageExecutor(self.offload, self.vae_tiling)
        conditions = self._encode(executor, request)
        noise = self._prior(executor, request)
        sampler = self._sampler(executor, request, noise, conditions)
        listened = callback_on_step_end is not None
        drawn = self._listened(sampler.steps(), callback_on_step_end) if listened else sampler.latents()
        images = self._decode(executor, drawn, request.height, request.width, output_type)
        return Output(images, list(request.seeds[: len(drawn)]), executor.timings())

    def stream(self, prompt: str | Sequence[str] | None = None, **arguments: Any) -> Iterator[Step]:
        """The steps of each picture in turn, as they are computed; arguments as those of a call that speak of pictures.
        The last step's latents are the picture's, bit for bit. Whoever leaves the loop computes no further step;
        `send(latents)` goes on from others. `decode` makes a picture of any step's latents or estimate."""
        request = SamplingRequest.checked(self.config, prompt=prompt, **arguments)
        for notice in request.notices:
            warnings.warn(notice, stacklevel=2)
        executor = StageExecutor(self.offload, self.vae_tiling)
        conditions = self._encode(executor, request)
        yield from self._sampler(executor, request, self._prior(executor, request), conditions).steps()

    def decode(
        self, latents: Any, height: int | None = None, width: int | None = None, *, output_type: str = "pil"
    ) -> Any:
        """Pictures of latents float32 [b, i, c], as `Output.images`; height and width in pixels (None: the model's own
        defaults)."""
        defaults = self.config.sampling
        size = defaults.height if height is None else height, defaults.width if width is None else width
        tokens = size[0] * size[1] // self.config.pixels_per_token**2
        if np.ndim(latents) != 3 or np.shape(latents)[1] != tokens:
            raise UserError(
                f"latents must be packed tokens [b, {tokens}, c] for {size[1]}x{size[0]} pixels, "
                f"not {list(np.shape(latents))}; pass their height and width."
            )
        return self._decode(StageExecutor(self.offload, self.vae_tiling), list(latents), *size, output_type)

    def free_encoders(self) -> None:
        """Drops T5 and CLIP from memory. Prompts of the last call, and embeddings given as arguments, still work."""
        self.t5 = self.clip = None

    def encode_prompt(self, prompt: str, max_sequence_length: int | None = None) -> tuple[jax.Array, jax.Array]:
        """text [1, t, d] and pooled [1, p] of one prompt; UserError when it is needed and the encoders were freed."""
        length = max_sequence_length or self.config.sampling.max_sequence_length
        return self._embed(StageExecutor(self.offload, self.vae_tiling), [prompt], length)[prompt, length]

    def _embed(
        self, executor: StageExecutor, prompts: Sequence[str], length: int
    ) -> dict[tuple[str, int], tuple[jax.Array, jax.Array]]:
        """(prompt, length) -> (text [1, t, d], pooled [1, p]); those of the last call are not computed again."""
        known = {(each, length): self._encoded[each, length] for each in prompts if (each, length) in self._encoded}
        new = [each for each in dict.fromkeys(prompts) if (each, length) not in known]
        if not new:
            return known
        if self.t5 is None or self.clip is None or self.tokenizers is None:
            raise UserError(
                "The text encoders were freed; pass prompt_embeds and pooled_prompt_embeds, or load the model anew."
            )
        for each in new:
            notice = self.tokenizers.truncation_warning(each, length)
            if notice is None and not self._told_of_clip:
                notice = self.tokenizers.clip_truncation_warning(each)
                self._told_of_clip = notice is not None
            if notice:
                warnings.warn(notice, stacklevel=5)
        t5_ids = [self.tokenizers.t5([each], length) for each in new]
        clip_ids = [self.tokenizers.clip([each]) for each in new]
        pairs = executor.encode(self.t5, self.clip, t5_ids, clip_ids)
        return known | {(each, length): pair for each, pair in zip(new, pairs, strict=True)}

    def _encode(self, executor: StageExecutor, request: SamplingRequest) -> list[programs.Conditions]:
        """What steers each picture: text [k, t, d] and pooled [k, p] of its prompt and, with true guidance, of its
        negative prompt; each different prompt is encoded once."""
        length, negatives = request.max_sequence_length, request.negative_prompts
        if wanted := [*request.prompts, *negatives]:
            self._encoded = self._embed(executor, wanted, length)
        if request.embeddings is None:
            pairs = [self._encoded[each, length] for each in request.prompts]
        else:
            texts, pools = (jnp.asarray(each, self.dtype) for each in request.embeddings)
            each = len(request.seeds) // len(texts)
            pairs = [(texts[i : i + 1], pools[i : i + 1]) for i in range(len(texts)) for _ in range(each)]
        if negatives:
            against = [self._encoded[each, length] for each in negatives]
            pairs = [tuple(map(jnp.concatenate, zip(*each, strict=True))) for each in zip(pairs, against, strict=True)]
        scales = jnp.asarray(request.guidance, jnp.float32), jnp.asarray(request.true_cfg, jnp.float32)
        grid = self._grid(request.height, request.width)
        return [
            programs.Conditions(text, pooled, *scales, _rope(self.config.transformer, *grid, text.shape[1]))
            for text, pooled in pairs
        ]

    def _prior(self, executor: StageExecutor, request: SamplingRequest) -> Any:
        """Noise [i, c] of each picture: what was given, or what its seed gives."""
        if request.latents is not None:
            return list(request.latents)
        rows, columns = self._grid(request.height, request.width)
        size = {"rows": rows, "columns": columns, "channels": self.config.vae.latent_channels}
        return [executor.run("denoise", programs.noise, np.uint32(seed), **size) for seed in request.seeds]

    def _sampler(self, executor: StageExecutor, request: SamplingRequest, noise: Sequence[Any], conditions) -> Sampler:
        rows, columns = self._grid(request.height, request.width)
        sigmas = schedule.sigmas(self.config.sampling, request.steps, rows * columns)
        return Sampler(executor, self.transformer, self.sharded, sigmas, noise, conditions, request.seeds, self.dtype)

    def _listened(self, steps: Generator[Step, Any, None], callback: Callback) -> list[np.ndarray]:
        """The last latents [i, c] of each picture, after the callback has heard of every step."""
        drawn: dict[int, np.ndarray] = {}
        step = next(steps, None)
        while step is not None:
            drawn[step.image] = step.latents[0]
            tensors = {"latents": step.latents, "denoised": step.denoised}
            changed = (callback(self, step.index, 1000 * step.sigma_before, tensors) or {}).get("latents")
            if changed is not None:
                drawn[step.image] = np.array(changed, np.float32).reshape(step.latents.shape)[0]
            if self.interrupt:
                break
            try:
                step = steps.send(changed)
            except StopIteration:
                break
        return list(drawn.values())

    def _decode(self, executor: StageExecutor, drawn: Sequence[Any], height: int, width: int, output_type: str) -> Any:
        """Latents [i, c] of pictures in the form asked for."""
        if output_type != "latent":
            drawn = executor.decode(self.vae, drawn, *self._grid(height, width))
        stacked = np.stack(drawn)
        return png.to_pil((stacked * 255).round().astype(np.uint8)) if output_type == "pil" else stacked

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return height // self.config.pixels_per_token, width // self.config.pixels_per_token


@functools.lru_cache(maxsize=4)
def _rope(config: TransformerConfig, rows: int, columns: int, text_tokens: int) -> jax.Array:
    return jax.device_put(schedule.rope_table(config, rows, columns, text_tokens))
