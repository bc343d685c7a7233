"""FLUX's transformer: noisy image tokens and text tokens in, the velocity of the image tokens out.

In: image tokens [b, i, in_channels], text [b, t, text_dim], `Modulation`, rotary table [2, t + i, head_dim / 2].
Out: velocity [b, i, in_channels]. Blocks are stacked on a leading axis in every leaf and scanned, so that the compiled
program holds one block of each kind. Modulation depends only on (timestep, guidance, pooled text), never on the image:
`modulation` computes it apart, and a sampler may do so for all steps before its loop.
Source: black-forest-labs/flux `src/flux/model.py`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.config import TransformerConfig
from flux_jax.models.blocks import DoubleStreamBlock, SingleStreamBlock
from flux_jax.models.fused_linear import modulate
from flux_jax.models.layers import Linear, stack
from flux_jax.models.ternary import scan_blocks


class Modulation(NamedTuple):
    """The (shift, scale, gate) vectors of every layer for a batch; leaves may carry further leading axes (steps)."""

    double_img: Float[Array, "*s L b 6*d"]
    double_txt: Float[Array, "*s L b 6*d"]
    single: Float[Array, "*s M b 3*d"]
    final: Float[Array, "*s b 2*d"]


def timestep_embedding(t: Float[Array, " b"], width: int, max_period: float = 10_000.0) -> Float[Array, "b {width}"]:
    """cos and sin of 1000 t max_period ** (-2i / width), cosines first (BFL `timestep_embedding`), float32."""
    half = width // 2
    # Angles reach thousands of radians, where a frequency's last bit shows: the exponent is rounded to float32 as in
    # the published code, and the exponential is formed on the host, where every machine rounds it alike.
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (1000.0 * t)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class MLPEmbedder(nnx.Module):
    """Two linears with SiLU between: [..., d_in] -> [..., d]."""

    def __init__(self, d_in: int, d: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.in_layer = Linear(d_in, d, dtype=dtype, rngs=rngs)
        self.out_layer = Linear(d, d, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b d"]:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class FinalLayer(nnx.Module):
    """Modulated norm and projection back to the latent's channels."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.mod = Linear(config.hidden_size, 2 * config.hidden_size, dtype=dtype, rngs=rngs)
        self.linear = Linear(config.hidden_size, config.in_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b i d"], mod: Float[Array, "b 2*d"]) -> Float[Array, "b i c"]:
        shift, scale = jnp.split(mod, 2, -1)
        return self.linear(modulate(x, shift, scale))


class Transformer(nnx.Module):
    """The velocity model v(x_t, t, text, guidance); see `TransformerConfig` for its dimensions."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        d = config.hidden_size
        self.time_in = MLPEmbedder(config.timestep_dim, d, dtype=dtype, rngs=rngs)
        self.vector_in = MLPEmbedder(config.pooled_dim, d, dtype=dtype, rngs=rngs)
        self.guidance_in = (
            MLPEmbedder(config.timestep_dim, d, dtype=dtype, rngs=rngs) if config.guidance_embeds else None
        )
        self.img_in = Linear(config.in_channels, d, dtype=dtype, rngs=rngs)
        self.txt_in = Linear(config.text_dim, d, dtype=dtype, rngs=rngs)
        self.double_blocks = stack(DoubleStreamBlock, config.num_double_blocks, config, dtype=dtype, rngs=rngs)
        self.single_blocks = stack(SingleStreamBlock, config.num_single_blocks, config, dtype=dtype, rngs=rngs)
        self.final_layer = FinalLayer(config, dtype=dtype, rngs=rngs)
        self.config = config
        self.rematerialise = False  # where memory is short: each block is computed again for its gradients
        self.unroll = False  # for training a few small blocks on a CPU, where a scan's copies cost as much as they do

    def vector(
        self, timesteps: Float[Array, " b"], guidance: Float[Array, " b"] | None, pooled: Float[Array, "b p"]
    ) -> Float[Array, "b d"]:
        """What every layer's modulation is a linear function of; arguments as of `modulation`."""
        dtype, width = pooled.dtype, self.config.timestep_dim
        vec = self.time_in(timestep_embedding(timesteps, width).astype(dtype)) + self.vector_in(pooled)
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model embeds guidance: pass `guidance`, float32 [b]")
            vec = vec + self.guidance_in(timestep_embedding(guidance, width).astype(dtype))
        return jax.nn.silu(vec)

    def modulation(
        self,
        timesteps: Float[Array, " b"],
        guidance: Float[Array, " b"] | None,
        pooled: Float[Array, "b p"],
    ) -> Modulation:
        """Every layer's modulation at noise levels `timesteps` (float32, 1 is pure noise); guidance is float32, or
        ignored by a model without guidance embedding. Raises ValueError if the model needs guidance and has none."""
        with jax.named_scope("modulation"):
            vec = self.vector(timesteps, guidance, pooled)
            each = jax.vmap(lambda linear: linear(vec))
            return Modulation(
                each(self.double_blocks.img.mod),
                each(self.double_blocks.txt.mod),
                each(self.single_blocks.mod),
                self.final_layer.mod(vec),
            )

    def __call__(
        self,
        img: Float[Array, "b i c"],
        txt: Float[Array, "b t k"],
        modulation: Modulation,
        rope: Float[Array, "2 t+i half"],
    ) -> Float[Array, "b i c"]:
        return self.single_stage(*self.double_stage(img, txt, modulation, rope), modulation, rope)

    def velocity(
        self,
        x: Float[Array, "b i c"],
        t: Float[Array, " b"],
        guidance: Float[Array, ""],
        text: Float[Array, "b k d"],
        pooled: Float[Array, "b p"],
        rope: Float[Array, "2 k+i half"],
    ) -> Float[Array, "b i c"]:
        """v(x_t, t) of each row by itself, modulation included, in text's dtype; x of any float dtype."""
        modulation = self.modulation(t, jnp.full(t.shape, guidance), pooled)
        return self(x.astype(text.dtype), text, modulation, rope)

    def double_stage(
        self,
        img: Float[Array, "b i c"],
        txt: Float[Array, "b t k"],
        modulation: Modulation,
        rope: Float[Array, "2 t+i half"],
    ) -> tuple[Float[Array, "b i d"], Float[Array, "b t d"]]:
        """The first part of a call, through the double blocks: image and text, each in its own stream."""

        def double(x, block, img_mod, txt_mod):
            with jax.named_scope("double_block"):
                return block(*x, img_mod, txt_mod, rope)

        start, modulations = (self.img_in(img), self.txt_in(txt)), (modulation.double_img, modulation.double_txt)
        return scan_blocks(self._per_layer(double), start, self.double_blocks, *modulations, unroll=self.unroll)

    def single_stage(
        self,
        img: Float[Array, "b i d"],
        txt: Float[Array, "b t d"],
        modulation: Modulation,
        rope: Float[Array, "2 t+i half"],
    ) -> Float[Array, "b i c"]:
        """The second part of a call, from the two streams on: the single blocks and the final layer."""

        def single(x, block, mod):
            with jax.named_scope("single_block"):
                return block(x, mod, rope)

        joined = jnp.concatenate([txt, img], axis=1)
        x = scan_blocks(self._per_layer(single), joined, self.single_blocks, modulation.single, unroll=self.unroll)
        with jax.named_scope("final_layer"):
            return self.final_layer(x[:, txt.shape[1] :], modulation.final)

    def _per_layer(self, layer):
        return jax.checkpoint(layer) if self.rematerialise else layer
