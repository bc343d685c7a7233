"""The T5 v1.1 encoder: every token of the prompt as a vector, the text stream of the velocity model.

In: token ids int32 [b, t], padded to a fixed length. Out: text [b, t, d_model]. FLUX was trained on the encoding of
the padded sequence without a mask, so padding is attended to like any other token. Architecture: Raffel et al. 2020
(relative position buckets, pre-RMSNorm, no biases, attention logits not scaled) with the gated GELU of Shazeer 2020.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.config import T5Config
from flux_jax.models.attention import softmax_attention
from flux_jax.models.layers import Embedding, Linear, RMSNorm, stack


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each (query, key) pair, int32 [length, length].

    Half of the buckets are for keys after the query. In each half, small distances have a bucket each, larger ones
    share buckets whose widths grow logarithmically, and everything from `max_distance` on falls into the last (Raffel
    et al. 2020, section 2.1). The logarithm is float32's, as in PyTorch, so that borders fall on the same distances.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    distance = np.abs(offset)
    half = num_buckets // 2
    exact = half // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    far = np.log(ratio) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + far.astype(np.int64), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class T5Layer(nnx.Module):
    """Self-attention and gated MLP, each added to the residual stream [b, t, d_model]."""

    def __init__(self, config: T5Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        inner = config.num_heads * config.head_dim

        def linear(d_in, d_out):
            return Linear(d_in, d_out, bias=False, dtype=dtype, rngs=rngs)

        self.attention_norm = RMSNorm(config.d_model, eps=config.eps, dtype=dtype)
        self.q = linear(config.d_model, inner)
        self.k = linear(config.d_model, inner)
        self.v = linear(config.d_model, inner)
        self.o = linear(inner, config.d_model)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.eps, dtype=dtype)
        self.wi_0 = linear(config.d_model, config.d_ff)
        self.wi_1 = linear(config.d_model, config.d_ff)
        self.wo = linear(config.d_ff, config.d_model)
        # The scale that attention lacks lives in the initial query weights.
        self.q.weight[...] = self.q.weight[...] * config.head_dim**-0.5

    def __call__(self, x: Float[Array, "b t d"], bias: Float[Array, "1 h t t"]) -> Float[Array, "b t d"]:
        x = x + self.attention(self.attention_norm(x), bias)
        y = self.mlp_norm(x)
        # The gate is formed in float32 and rounded once: its product is where T5's activations grow largest.
        gate = jax.nn.gelu(self.wi_0(y).astype(jnp.float32), approximate=True)
        return x + self.wo((gate * self.wi_1(y).astype(jnp.float32)).astype(x.dtype))

    def attention(self, x: Float[Array, "b t d"], bias: Float[Array, "1 h t t"]) -> Float[Array, "b t d"]:
        """All tokens attend to all; `bias` is added to the logits."""
        b, t, _ = x.shape
        q, k, v = (project(x).reshape(b, t, -1, self.head_dim) for project in (self.q, self.k, self.v))
        return self.o(softmax_attention(q, k, v, scale=1.0, bias=bias))


class T5Encoder(nnx.Module):
    """ids int32 [b, t] -> text [b, t, d_model] in `dtype`. One table of position biases serves all layers."""

    def __init__(self, config: T5Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        self.relative_attention_bias = Embedding(config.num_buckets, config.num_heads, dtype=dtype, rngs=rngs)
        self.layers = stack(T5Layer, config.num_layers, config, dtype=dtype, rngs=rngs)
        self.final_norm = RMSNorm(config.d_model, eps=config.eps, dtype=dtype)
        # Unit variance, so that a token still stands out in the residual stream behind the first layers.
        self.token_embedding.weight[...] = jax.random.normal(rngs.params(), (config.vocab_size, config.d_model), dtype)

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        bias = self.position_bias(ids.shape[1])
        x, _ = jax.lax.scan(lambda x, layer: (layer(x, bias), None), self.token_embedding(ids), self.layers)
        return self.final_norm(x)

    def position_bias(self, length: int) -> Float[Array, "1 h t t"]:
        """What every layer adds to its logits for a text of `length` tokens, float32."""
        buckets = relative_position_buckets(length, self.config.num_buckets, self.config.max_distance)
        return self.relative_attention_bias(jnp.asarray(buckets)).transpose(2, 0, 1)[None].astype(jnp.float32)
