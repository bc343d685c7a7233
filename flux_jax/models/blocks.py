"""FLUX's two kinds of transformer block.

In: image tokens [b, i, d] and text tokens [b, t, d] (double block) or both joined, text first (single block), each
block's modulation vectors, and the rotary table. Out: tokens of the same shapes. Source: black-forest-labs/flux
`src/flux/modules/layers.py`; the names of layers are those of the published single file.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.config import TransformerConfig
from flux_jax.models.attention import attention
from flux_jax.models.fused_linear import gated_linear, modulated_linear
from flux_jax.models.layers import Linear, RMSNorm
from pallas_kernels.epilogues import EPS, Gelu, NormRope


def split_heads(x: Float[Array, "b t n"], config: TransformerConfig) -> Float[Array, "b t h d"]:
    return x.reshape(*x.shape[:2], config.num_heads, config.head_dim)


def projections(
    query_norm: RMSNorm, key_norm: RMSNorm, width: int, rope: Float[Array, "2 t half"]
) -> list[tuple[int, NormRope | None]]:
    """The slices of a product that are queries, keys and values: `width` channels each, queries and keys with norm and
    rope."""
    then = NormRope(query_norm.weight[...], rope), NormRope(key_norm.weight[...], rope), None
    return [(width, epilogue) for epilogue in then]


class Stream(nnx.Module):
    """One modality's half of a double block: its modulation, projections, and MLP."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        d = config.hidden_size
        self.mod = Linear(d, 6 * d, dtype=dtype, rngs=rngs)
        self.qkv = Linear(d, 3 * d, dtype=dtype, rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, eps=EPS, dtype=dtype)
        self.key_norm = RMSNorm(config.head_dim, eps=EPS, dtype=dtype)
        self.proj = Linear(d, d, dtype=dtype, rngs=rngs)
        self.mlp_in = Linear(d, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(config.mlp_dim, d, dtype=dtype, rngs=rngs)
        self.config = config

    def project(
        self, x: Float[Array, "b t d"], mod: list[Float[Array, "b d"]], rope: Float[Array, "2 t half"]
    ) -> list[Float[Array, "b t h w"]]:
        """Queries and keys, normalised and with their rotary positions, and values; mod: shift and scale."""
        shift, scale = mod
        slices = projections(self.query_norm, self.key_norm, self.config.hidden_size, rope)
        return [split_heads(y, self.config) for y in modulated_linear(self.qkv, x, shift, scale, *slices)]

    def finish_block(
        self, x: Float[Array, "b t d"], attended: Float[Array, "b t a"], mod: list[Float[Array, "b d"]]
    ) -> Float[Array, "b t d"]:
        """x with what attention found, and then with what the MLP makes of it; mod: gate; shift, scale and gate."""
        gate, mlp_shift, mlp_scale, mlp_gate = mod
        x = gated_linear(self.proj, [attended], gate, x)
        (hidden,) = modulated_linear(self.mlp_in, x, mlp_shift, mlp_scale, (self.config.mlp_dim, Gelu()))
        return gated_linear(self.mlp_out, [hidden], mlp_gate, x)


class DoubleStreamBlock(nnx.Module):
    """Image and text keep their own weights and meet in one attention."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.img = Stream(config, dtype=dtype, rngs=rngs)
        self.txt = Stream(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        img: Float[Array, "b i d"],
        txt: Float[Array, "b t d"],
        img_mod: Float[Array, "b 6*d"],
        txt_mod: Float[Array, "b 6*d"],
        rope: Float[Array, "2 t+i half"],
    ) -> tuple[Float[Array, "b i d"], Float[Array, "b t d"]]:
        t = txt.shape[1]
        streams = ((self.txt, txt, jnp.split(txt_mod, 6, -1)), (self.img, img, jnp.split(img_mod, 6, -1)))
        turns = rope[:, :t], rope[:, t:]
        projected = [stream.project(x, mod[:2], turn) for (stream, x, mod), turn in zip(streams, turns, strict=True)]
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*projected, strict=True))
        attended = jnp.split(attention(q, k, v), [t], axis=1)
        txt, img = (stream.finish_block(x, a, mod[2:]) for (stream, x, mod), a in zip(streams, attended, strict=True))
        return img, txt


class SingleStreamBlock(nnx.Module):
    """Text and image share weights; attention and MLP run side by side and leave through one projection."""

    def __init__(self, config: TransformerConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        d = config.hidden_size
        self.mod = Linear(d, 3 * d, dtype=dtype, rngs=rngs)
        self.linear1 = Linear(d, 3 * d + config.mlp_dim, dtype=dtype, rngs=rngs)
        self.linear2 = Linear(d + config.mlp_dim, d, dtype=dtype, rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, eps=EPS, dtype=dtype)
        self.key_norm = RMSNorm(config.head_dim, eps=EPS, dtype=dtype)
        self.config = config

    def __call__(
        self, x: Float[Array, "b t d"], mod: Float[Array, "b 3*d"], rope: Float[Array, "2 t half"]
    ) -> Float[Array, "b t d"]:
        shift, scale, gate = jnp.split(mod, 3, -1)
        slices = projections(self.query_norm, self.key_norm, self.config.hidden_size, rope)
        *qkv, hidden = modulated_linear(self.linear1, x, shift, scale, *slices, (self.config.mlp_dim, Gelu()))
        attended = attention(*(split_heads(y, self.config) for y in qkv))
        return gated_linear(self.linear2, [attended, hidden], gate, x)
