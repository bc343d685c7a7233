"""The reference implementations, tiny and random: the only file of the project that imports torch and diffusers.

In: a `FluxConfig` (see `tiny`) and a seed. Out: torch modules with every weight drawn at random (no norm left at one,
no bias at zero), their state dicts as numpy, their outputs as numpy, or a whole FluxPipeline folder on disk. Importing
this file without torch skips the importing test module with a reason.
"""

import dataclasses
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from flux_jax.config import CLIPConfig, FluxConfig, SamplingConfig, T5Config, TransformerConfig, VAEConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
REASON = "needs torch, diffusers and transformers (pip install -e '.[test]' on Python 3.11)"
with warnings.catch_warnings():  # warnings are errors in our tests; those of other people's imports are not ours
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason=REASON)
    diffusers = pytest.importorskip("diffusers", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from diffusers.models.embeddings import Timesteps
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
    from transformers import T5Config as TorchT5Config

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
torch.set_num_threads(2)


def tiny(guidance: bool = True, latent_channels: int = 16, eos_token_id: int = 2) -> FluxConfig:
    """A FluxConfig of every part at toy size: dev (guidance) or schnell; CLIP with either end-of-text convention."""
    return FluxConfig(
        name="tiny-dev" if guidance else "tiny-schnell",
        transformer=TransformerConfig(
            in_channels=4 * latent_channels,
            hidden_size=64,
            num_heads=2,
            num_double_blocks=2,
            num_single_blocks=3,
            text_dim=48,
            pooled_dim=24,
            axes_dim=(8, 12, 12),
            guidance_embeds=guidance,
        ),
        t5=T5Config(
            vocab_size=96, d_model=48, d_ff=80, num_heads=3, head_dim=16, num_layers=3, num_buckets=8, max_distance=20
        ),
        clip=CLIPConfig(
            vocab_size=96,
            hidden_size=24,
            mlp_dim=40,
            num_heads=3,
            num_layers=2,
            max_positions=20,
            eos_token_id=eos_token_id,
        ),
        vae=VAEConfig(latent_channels=latent_channels, channels=(8, 16, 24, 24), layers_per_block=2, norm_groups=4),
        sampling=SamplingConfig()
        if guidance
        else SamplingConfig(
            use_dynamic_shifting=False, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256
        ),
    )


def randomise(module: "torch.nn.Module", seed: int) -> "torch.nn.Module":
    """Every floating parameter drawn anew, sized so that activations stay near one: matrices ~ fan_in^-1/2, norms ~ 1,
    biases ~ 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                is_norm = name.endswith("weight")
                p.copy_(1 + 0.2 * noise if is_norm else 0.1 * noise)
            elif "embed" in name or "shared" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * p[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


class ExactTimesteps(torch.nn.Module):
    """diffusers' `Timesteps` with correctly rounded frequencies.

    PyTorch's vectorised float32 exp is one bit off in 2 of the 128 (on AVX-512; others elsewhere), which turns angles
    of 6,000 radians by 2.4e-4 and the velocity of a tiny random model by 3e-5: noise of the reference, not of what is
    compared with it. `test_sinusoidal_equals_diffusers` bounds the difference itself.
    """

    def forward(self, timesteps):
        exponents = -math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128
        angles = timesteps[:, None].float() * exponents.double().exp().float()[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def run_timesteps(values) -> np.ndarray:
    """diffusers' own embedding [b, 256] of `values` [b], which it expects multiplied by 1000."""
    return Timesteps(256, True, 0)(tensor(values)).numpy()


def transformer(config: TransformerConfig, seed: int = 0) -> "FluxTransformer2DModel":
    module = randomise(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=config.in_channels,
            num_layers=config.num_double_blocks,
            num_single_layers=config.num_single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.text_dim,
            pooled_projection_dim=config.pooled_dim,
            guidance_embeds=config.guidance_embeds,
            axes_dims_rope=config.axes_dim,
        ),
        seed,
    )
    module.time_text_embed.time_proj = ExactTimesteps()
    return module


def t5(config: T5Config, seed: int = 1) -> "T5EncoderModel":
    return randomise(
        T5EncoderModel(
            TorchT5Config(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                d_ff=config.d_ff,
                d_kv=config.head_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                dropout_rate=0.0,
                relative_attention_num_buckets=config.num_buckets,
                relative_attention_max_distance=config.max_distance,
                layer_norm_epsilon=config.eps,
                feed_forward_proj="gated-gelu",
            )
        ),
        seed,
    )


def clip(config: CLIPConfig, seed: int = 2) -> "CLIPTextModel":
    return randomise(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.mlp_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                projection_dim=config.hidden_size,
                max_position_embeddings=config.max_positions,
                hidden_act=config.activation,
                layer_norm_eps=config.eps,
                eos_token_id=config.eos_token_id,
                bos_token_id=0,
                pad_token_id=1,
            )
        ),
        seed,
    )


def vae(config: VAEConfig, seed: int = 3) -> "AutoencoderKL":
    levels = len(config.channels)
    return randomise(
        AutoencoderKL(
            in_channels=config.image_channels,
            out_channels=config.image_channels,
            latent_channels=config.latent_channels,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_block,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=config.norm_groups,
            scaling_factor=config.scaling_factor,
            shift_factor=config.shift_factor,
            sample_size=64,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=True,
        ),
        seed,
    )


BUILDERS = {"transformer": transformer, "t5": t5, "clip": clip, "vae": vae}


def build(part: str, config: FluxConfig, seed: int | None = None):
    """The reference module of one part ("transformer", "t5", "clip", "vae")."""
    section = getattr(config, part)
    return BUILDERS[part](section) if seed is None else BUILDERS[part](section, seed)


def state_dict_numpy(module) -> dict[str, np.ndarray]:
    """Names as the module has them -> float32 arrays."""
    return {name: value.detach().float().numpy().copy() for name, value in module.state_dict().items()}


def tensor(x) -> "torch.Tensor":
    """A torch copy of an array (jax or numpy); integers become int64, as torch's embeddings want."""
    x = np.array(x)
    return torch.from_numpy(x.astype(np.int64) if x.dtype.kind in "iu" else x)


def run_transformer(module, img, txt, pooled, timesteps, img_ids, txt_ids, guidance=None) -> np.ndarray:
    """Velocity [b, i, c]. timesteps in [0, 1] [b], guidance [b] in its own unit (3.5) or None, ids [n, 3]."""
    with torch.no_grad():
        out = module(
            hidden_states=tensor(img),
            encoder_hidden_states=tensor(txt),
            pooled_projections=tensor(pooled),
            timestep=tensor(timesteps),
            img_ids=tensor(np.asarray(img_ids, np.float32)),
            txt_ids=tensor(np.asarray(txt_ids, np.float32)),
            guidance=None if guidance is None else tensor(guidance),
            return_dict=False,
        )[0]
    return out.numpy()


def run_t5(module, ids) -> np.ndarray:
    """Last hidden state [b, t, d_model] without a mask, as FLUX uses it."""
    with torch.no_grad():
        return module(tensor(ids), output_hidden_states=False)[0].numpy()


def run_clip(module, ids) -> np.ndarray:
    """Pooled output [b, hidden]."""
    with torch.no_grad():
        return module(tensor(ids), output_hidden_states=False).pooler_output.numpy()


def run_vae_decode(module, latents) -> np.ndarray:
    """Normalised latents [b, h, w, c] (as our VAE.decode takes them) -> images [b, 8h, 8w, 3]."""
    z = tensor(latents).permute(0, 3, 1, 2) / module.config.scaling_factor + module.config.shift_factor
    with torch.no_grad():
        return module.decode(z, return_dict=False)[0].permute(0, 2, 3, 1).numpy()


def run_vae_moments(module, images) -> tuple[np.ndarray, np.ndarray]:
    """Images [b, h, w, 3] -> mean and log variance [b, h/8, w/8, c] of the posterior, unscaled."""
    with torch.no_grad():
        posterior = module.encode(tensor(images).permute(0, 3, 1, 2)).latent_dist
    return posterior.mean.permute(0, 2, 3, 1).numpy(), posterior.logvar.permute(0, 2, 3, 1).numpy()


def scheduler(config: SamplingConfig) -> "FlowMatchEulerDiscreteScheduler":
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=config.base_seq_len,
        max_image_seq_len=config.max_seq_len,
        base_shift=config.base_shift,
        max_shift=config.max_shift,
        use_dynamic_shifting=config.use_dynamic_shifting,
        shift=3.0 if config.use_dynamic_shifting else 1.0,
    )


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizers(config: FluxConfig) -> tuple["CLIPTokenizer", "T5TokenizerFast"]:
    """Real tokenizers over single letters, small enough for the tiny vocabularies; CLIP's end of text has the largest
    id.
    """
    last = config.clip.vocab_size - 1
    vocabulary = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    clip_vocabulary = {piece: i + 3 for i, piece in enumerate(vocabulary)} | {
        "<|startoftext|>": last - 1,
        "<|endoftext|>": last,
    }
    clip_tokenizer = CLIPTokenizer(vocab=clip_vocabulary, merges=[], model_max_length=config.clip.max_positions)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    t5_tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=config.sampling.max_sequence_length)
    return clip_tokenizer, t5_tokenizer


def pipeline(config: FluxConfig, seed: int = 0, dtype=None) -> "FluxPipeline":
    """A whole tiny FluxPipeline with random weights, float32 unless `dtype` (a torch dtype) says otherwise."""
    clip_tokenizer, t5_tokenizer = tokenizers(config)
    pipe = FluxPipeline(
        scheduler=scheduler(config.sampling),
        transformer=transformer(config.transformer, seed),
        vae=vae(config.vae, seed + 1),
        text_encoder=clip(config.clip, seed + 2),
        text_encoder_2=t5(config.t5, seed + 3),
        tokenizer=clip_tokenizer,
        tokenizer_2=t5_tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype or torch.float32)


def save_pipeline(
    folder: Path, config: FluxConfig, seed: int = 0, dtype=None, shard_bytes: int | None = None
) -> "FluxPipeline":
    """Writes the tiny pipeline as a diffusers folder (sharded where `shard_bytes` is given); returns it."""
    pipe = pipeline(config, seed, dtype)
    options = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    pipe.save_pretrained(folder, safe_serialization=True, **options)
    return pipe


def load_pipeline(folder: Path, dtype=None) -> "FluxPipeline":
    """diffusers' own reading of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = FluxPipeline.from_pretrained(str(folder), torch_dtype=dtype or torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(
    pipe, prompt, latents, *, steps: int, guidance: float, height: int, width: int, max_sequence_length: int = 32
):
    """Packed latents [b, i, c] in -> (final packed latents [b, i, c], images float [b, h, w, 3] in [0, 1]), both
    numpy.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        final = pipe(
            prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=tensor(latents),
            max_sequence_length=max_sequence_length,
            output_type="latent",
        ).images
        z = pipe._unpack_latents(final, height, width, pipe.vae_scale_factor)
        z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        images = pipe.image_processor.postprocess(pipe.vae.decode(z, return_dict=False)[0], output_type="np")
    return final.numpy(), images


def run_scheduler(config: SamplingConfig, steps: int, image_tokens: int) -> np.ndarray:
    """Noise levels [steps + 1] of diffusers' scheduler, driven as FluxPipeline does."""
    module = scheduler(config)
    mu = calculate_shift(image_tokens, config.base_seq_len, config.max_seq_len, config.base_shift, config.max_shift)
    module.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return module.sigmas.numpy()


def with_heads(config: FluxConfig, **changes) -> FluxConfig:
    """`config` with fields of its transformer replaced, for width and depth variants."""
    return dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **changes))
