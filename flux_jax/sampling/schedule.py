"""The sampler's arithmetic: noise, patches, position ids and the schedule of noise levels.

In: a picture's size and a seed. Out: latents [h, w, c], tokens [b, i, 4 c], ids [t + i, 3], sigmas [n + 1].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from flux_jax.config import SamplingConfig, TransformerConfig
from flux_jax.models.attention import rope_cos_sin


def initial_noise(
    seed: int | UInt[Array, ""], height: int, width: int, channels: int
) -> Float[Array, "height width channels"]:
    """Standard normal latents (float32) of one image; height and width in latents. A function of the seed alone."""
    return jax.random.normal(jax.random.key(seed), (height, width, channels), jnp.float32)


def pack_latents(latents: Float[Array, "b h w c"]) -> Float[Array, "b h/2*w/2 c*4"]:
    """2 x 2 patches as tokens in raster order; a token's channels run (c, row, column), as in the published weights."""
    b, h, w, c = latents.shape
    x = latents.reshape(b, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, (h // 2) * (w // 2), c * 4)


def unpack_latents(tokens: Float[Array, "b i k"], height: int, width: int) -> Float[Array, "b height width k/4"]:
    """The inverse of `pack_latents`; height and width in latents."""
    b, _, k = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, k // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, height, width, k // 4)


def position_ids(rows: int, columns: int, text_tokens: int) -> np.ndarray:
    """float32 [text_tokens + rows * columns, 3]: zeros for text, (0, row, column) for each image token."""
    ids = np.zeros((text_tokens + rows * columns, 3), np.float32)
    ids[text_tokens:, 1], ids[text_tokens:, 2] = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    return ids


def rope_table(config: TransformerConfig, rows: int, columns: int, text_tokens: int) -> Float[np.ndarray, "2 n half"]:
    """Cosines and sines of every token's position, text first: float32 [2, text_tokens + rows * columns, head_dim /
    2]."""
    return rope_cos_sin(position_ids(rows, columns, text_tokens), config.axes_dim, float(config.theta))


def shift_mu(config: SamplingConfig, image_tokens: int) -> float:
    """Log of the schedule's shift, linear in the number of image tokens (BFL `get_lin_function`)."""
    slope = (config.max_shift - config.base_shift) / (config.max_seq_len - config.base_seq_len)
    return slope * (image_tokens - config.base_seq_len) + config.base_shift


def sigmas(config: SamplingConfig, num_steps: int, image_tokens: int) -> np.ndarray:
    """Noise levels float32 [num_steps + 1] from 1 down to 0: 1, ..., 1 / n, shifted towards noise for large pictures:
    sigma = e^mu / (e^mu + 1 / t - 1) (BFL `time_shift`)."""
    t = np.linspace(1.0, 1.0 / num_steps, num_steps)
    if config.use_dynamic_shifting:
        e = math.exp(shift_mu(config, image_tokens))
        t = e / (e + 1.0 / t - 1.0)
    return np.append(t, 0.0).astype(np.float32)
