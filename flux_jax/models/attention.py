"""Rotary positions, and the attention of every part.

In: queries, keys and values [b, t, heads, d]; position ids [t, axes]. Out: attended values [b, t, heads * d].
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import current_target
from pallas_kernels.reference import precision


def rope_cos_sin(ids: np.ndarray, axes_dim: tuple[int, ...], theta: float) -> np.ndarray:
    """Cosines and sines [2, t, d / 2] (float32) of every token's position angles, d = sum(axes_dim).

    ids [t, axes] are positions along each axis (for FLUX: 0, row, column). Axis a with width w turns its i-th pair of
    channels by ids[:, a] * theta ** (-2 i / w). Angles are computed in float64, as diffusers does: at theta 10,000 a
    float32 angle loses the last bits of large positions.
    """
    angles = np.concatenate(
        [
            np.outer(ids[:, axis].astype(np.float64), theta ** (-np.arange(0, width, 2, dtype=np.float64) / width))
            for axis, width in enumerate(axes_dim)
        ],
        axis=-1,
    )
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def apply_rope(x: Float[Array, "b t h d"], rope: Float[Array, "2 t d/2"]) -> Float[Array, "b t h d"]:
    """Turn each interleaved pair of channels (2i, 2i + 1) by its position's angle, in float32 (RoFormer, 3.2)."""
    cos, sin = rope[:, None, :, None]
    even, odd = jnp.unstack(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), axis=-1)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def softmax_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    scale: float | None = None,
    bias: Float[Array, "1 #h t s"] | None = None,
) -> Float[Array, "b t h*d"]:
    """softmax(scale q k^T + bias) v, heads joined in the last axis; logits stay in float32 through the softmax.

    scale: 1 / sqrt(d) where None; bias float32, -inf for a key that a query may not see.
    """
    how = {"precision": precision(q.dtype)}
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32, **how)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = jax.nn.softmax(logits if bias is None else logits + bias).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v, **how).reshape(*q.shape[:2], -1)


def attention(
    q: Float[Array, "b t h d"], k: Float[Array, "b t h d"], v: Float[Array, "b t h d"]
) -> Float[Array, "b t h*d"]:
    """softmax(q k^T / sqrt(d)) v over all tokens, heads joined in the last axis; q and k are turned already.

    cuDNN's fused kernel runs where it can (a GPU from compute capability 8.0 and 16-bit types: no logits in memory),
    `softmax_attention` elsewhere.
    """
    target = current_target()
    ampere = target.platform == "gpu" and int(target.compute_capability.partition(".")[0]) >= 8
    if not ampere or q.dtype not in (jnp.bfloat16, jnp.float16):
        return softmax_attention(q, k, v)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code promotes inside, also where ours may not
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return out.reshape(*out.shape[:2], -1)
