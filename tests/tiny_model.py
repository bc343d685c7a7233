"""A whole model with random weights, so small that its programs compile in seconds: for tests of what stands around a
model.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from flux_jax.config import CLIPConfig, FluxConfig, SamplingConfig, T5Config, TransformerConfig, VAEConfig
from flux_jax.models import params
from flux_jax.models.quantize import quantize_transformer
from flux_jax.nano import vocabulary

COMPONENTS = tuple(params.COMPONENTS)
WORDS = "a red blue green circle square triangle to the left of right and two three photo"


def config() -> FluxConfig:
    """Every part at toy size; 16 pixels a token, and 64 x 32 pixels by default, so that rows and columns differ."""
    return FluxConfig(
        name="FLUX-tiny",
        transformer=TransformerConfig(
            hidden_size=32, num_heads=2, num_double_blocks=1, num_single_blocks=2, text_dim=24, pooled_dim=16,
            axes_dim=(4, 6, 6), timestep_dim=32,
        ),
        t5=T5Config(vocab_size=160, d_model=24, d_ff=32, num_heads=2, head_dim=8, num_layers=1, max_distance=16),
        clip=CLIPConfig(vocab_size=400, hidden_size=16, mlp_dim=32, num_heads=2, num_layers=1, max_positions=16),
        vae=VAEConfig(channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4),
        sampling=SamplingConfig(
            base_seq_len=8, max_seq_len=64, num_inference_steps=3, max_sequence_length=12, height=32, width=64
        ),
    )  # fmt: skip


def schnell_config() -> FluxConfig:
    """The same without embedded guidance."""
    return dataclasses.replace(
        config(), name="FLUX-tiny-schnell", transformer=dataclasses.replace(config().transformer, guidance_embeds=False)
    )


def published_config() -> FluxConfig:
    """The same as diffusers' classes can express it, too."""
    return dataclasses.replace(config(), transformer=dataclasses.replace(config().transformer, timestep_dim=256))


# One program: operation by operation, most of the time would go into compiling each of them for each shape.
quantized = jax.jit(quantize_transformer, static_argnames=("method", "activations"))


def modules(config: FluxConfig, seed: int = 0) -> dict:
    """Part -> module; matrices drawn at 1 / sqrt(fan in), norms near one."""
    rng = np.random.default_rng(seed)
    return {part: filled(params.abstract_component(part, config), rng) for part in params.COMPONENTS}


def filled(module, rng: np.random.Generator):
    """An abstract module (of `nnx.eval_shape`) with such weights: nothing is compiled to draw them."""
    shapes = params.leaf_table(module)
    return params.assemble(module, lambda names: {name: draw(rng, name, shapes[name]) for name in names})


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape, np.float32)
    if len(shape) < 2:
        return (1 + 0.1 * x if name.endswith("weight") else 0.1 * x).astype(np.float32)
    return x * np.float32(1.0 if "embedding" in name else np.prod(shape[1:]) ** -0.5)


def tokenizers(folder: Path, config: FluxConfig) -> Path:
    """Tokenizer files of the words above, in `folder`."""
    vocabulary.build(folder, [WORDS], config)
    return folder


def save(folder: Path, config: FluxConfig, seed: int = 0) -> Path:
    """A checkpoint of the modules above."""
    from flux_jax.checkpoints import writer

    words = tokenizers(folder.with_name(folder.name + "-words"), config)
    return writer.save(folder, config, modules(config, seed), tokenizers=words)
