"""The programs that XLA compiles for a picture: text, denoising, decoding.

In: modules, token ids, tokens of one picture [i, c], noise levels [n + 1], all of them traced arguments, so that
another prompt, seed, guidance or set of weights runs the same program. Out: text, latents, pixels.

Every program handles ONE picture; a batch is a loop over pictures in Python. XLA's matrix products are not the same to
the last bit at other batch sizes, and the promise "same seed, same image, whatever the batch" is kept by never having
one. It costs little: a single picture of FLUX's size fills a GPU, memory does not grow with the batch, and another
batch size compiles nothing.

Nor do the programs call back to the host to report progress: JAX does not keep programs with host callbacks in its
persistent cache. A caller that wants each step drives `step`, the body of `denoise` as a program of its own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt

from flux_jax.config import TransformerConfig
from flux_jax.models.transformer import Modulation, Transformer
from flux_jax.models.vae import VAE
from flux_jax.sampling.schedule import initial_noise, pack_latents, unpack_latents


class Conditions(NamedTuple):
    """What steers one picture. k is 1, or 2 with true classifier-free guidance: the prompt, the negative prompt."""

    text: Float[Array, "k t d"]
    pooled: Float[Array, "k p"]
    guidance: Float[Array, ""]
    true_cfg: Float[Array, ""]
    rope: Float[Array, "2 t+i half"]


def abstract_inputs(
    config: TransformerConfig, steps: int, image_tokens: int, text_tokens: int, dtype: Any
) -> tuple[Any, Any, Conditions]:
    """Latents, sigmas and conditions that `denoise` takes for one picture, with shapes for arrays. dtype: of the
    text."""

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    conditions = Conditions(
        text=array(1, text_tokens, config.text_dim, dtype=dtype),
        pooled=array(1, config.pooled_dim, dtype=dtype),
        guidance=array(),
        true_cfg=array(),
        rope=array(2, text_tokens + image_tokens, config.head_dim // 2),
    )
    return array(image_tokens, config.in_channels), array(steps + 1), conditions


@functools.partial(jax.jit, static_argnames=("rows", "columns", "channels"))
def noise(seed: UInt[Array, ""], rows: int, columns: int, channels: int) -> Float[Array, "i c"]:
    """A picture's noise as tokens, from its own seed (uint32); channels of a latent."""
    return pack_latents(initial_noise(seed, 2 * rows, 2 * columns, channels)[None])[0]


@jax.jit
def encode(t5: nnx.Module, clip: nnx.Module, t5_ids: Int[Array, "1 t"], clip_ids: Int[Array, "1 p"]):
    """Token ids of one prompt -> text [1, t, d] and pooled [1, p], in the encoders' dtype."""
    with jax.named_scope("text"):
        return t5(t5_ids), clip(clip_ids)


@jax.jit
def pool(clip: nnx.Module, clip_ids: Int[Array, "1 p"]) -> Float[Array, "1 d"]:
    """The half of `encode` that is CLIP's, for a T5 that does not fit into a program."""
    with jax.named_scope("text"):
        return clip(clip_ids)


@jax.jit
def modulations(transformer: Transformer, sigmas: Float[Array, " levels"], conditions: Conditions) -> Modulation:
    """The modulation of all steps, leaves [n, ...]: it depends on (t, guidance, pooled text), never on the picture."""
    n, k = sigmas.shape[0] - 1, conditions.pooled.shape[0]
    guidance = jnp.full((n * k,), conditions.guidance)
    flat = transformer.modulation(jnp.repeat(sigmas[:-1], k), guidance, jnp.tile(conditions.pooled, (n, 1)))
    return jax.tree.map(lambda m: jnp.moveaxis(m.reshape(*m.shape[:-2], n, k, m.shape[-1]), -3, 0), flat)


def _step(transformer, latents, sigmas, conditions: Conditions, modulation: Modulation, i):
    """Step i: the velocity at noise level sigmas[i], then Euler to sigmas[i + 1]. -> latents, denoised, finite."""
    k = conditions.text.shape[0]
    now, after = sigmas[i], sigmas[i + 1]
    tokens = jnp.broadcast_to(latents[None], (k, *latents.shape)).astype(conditions.text.dtype)
    v = transformer(tokens, conditions.text, jax.tree.map(lambda m: m[i], modulation), conditions.rope)
    v = v.astype(jnp.float32)
    v = v[0] if k == 1 else v[1] + conditions.true_cfg * (v[0] - v[1])
    # The barrier keeps the update a computation of its own, compiled alike in `denoise` and in `step`.
    latents, v = jax.lax.optimization_barrier((latents, v))
    moved = latents + (after - now) * v
    return moved, latents - now * v, jnp.isfinite(moved).all()


@functools.partial(jax.jit, donate_argnames="latents")
def step(
    transformer: Transformer,
    latents: Float[Array, "i c"],
    sigmas: Float[Array, " levels"],
    conditions: Conditions,
    modulation: Modulation,
    i: Int[Array, ""],
) -> tuple[Float[Array, "i c"], Float[Array, "i c"], Bool[Array, ""]]:
    """One step: latents at sigmas[i + 1], the picture predicted from here (x - sigma v), and whether all is finite."""
    return _step(transformer, latents, sigmas, conditions, modulation, i)


@functools.partial(jax.jit, donate_argnames="latents")
def denoise(
    transformer: Transformer, latents: Float[Array, "i c"], sigmas: Float[Array, " levels"], conditions: Conditions
) -> tuple[Float[Array, "i c"], Bool[Array, " levels-1"]]:
    """All steps in one program: noise (float32) -> latents, and for each step whether all was finite behind it."""
    modulation = modulations(transformer, sigmas, conditions)

    def body(latents, i):
        latents, _, finite = _step(transformer, latents, sigmas, conditions, modulation, i)
        return latents, finite

    with jax.named_scope("denoise"):
        return jax.lax.scan(body, latents, jnp.arange(sigmas.shape[0] - 1))


@functools.partial(jax.jit, static_argnames=("rows", "columns", "strip_bytes"))
def decode(
    vae: VAE, latents: Float[Array, "i c"], rows: int, columns: int, strip_bytes: int | None = None
) -> Float[Array, "h w 3"]:
    """Tokens of one picture, rows x columns of them -> pixels float32 in [0, 1], NaN where the VAE's are not finite.
    strip_bytes: see `flux_jax.models.vae_tiling`."""
    with jax.named_scope("decode"):
        latents = unpack_latents(latents[None], 2 * rows, 2 * columns)
        image = vae.decode(latents, strip_bytes)[0].astype(jnp.float32)
        return jnp.where(jnp.isfinite(image), jnp.clip(image * 0.5 + 0.5, 0.0, 1.0), jnp.nan)
