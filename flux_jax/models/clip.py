"""The CLIP text tower: the whole prompt as one vector, which modulates every block of the velocity model.

In: token ids int32 [b, t], t up to max_positions, with an end-of-text token in each row. Out: pooled [b, hidden_size],
the final norm's output at that token. Architecture: Radford et al. 2021 (causal pre-norm transformer, learned
positions). FLUX uses the tower without CLIP's text projection.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.config import CLIPConfig
from flux_jax.models.attention import softmax_attention
from flux_jax.models.layers import Embedding, LayerNorm, Linear, stack

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class CLIPLayer(nnx.Module):
    """Self-attention (causal in the text tower) and MLP, each added to the residual stream [b, t, hidden_size]."""

    def __init__(self, config: CLIPConfig, causal: bool = True, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.causal = causal
        self.num_heads = config.num_heads
        self.activation = config.activation
        width = config.hidden_size

        def linear(d_in, d_out):
            return Linear(d_in, d_out, dtype=dtype, rngs=rngs)

        self.norm1 = LayerNorm(width, eps=config.eps, dtype=dtype)
        self.q = linear(width, width)
        self.k = linear(width, width)
        self.v = linear(width, width)
        self.out = linear(width, width)
        self.norm2 = LayerNorm(width, eps=config.eps, dtype=dtype)
        self.fc1 = linear(width, config.mlp_dim)
        self.fc2 = linear(config.mlp_dim, width)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x))))

    def attention(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Tokens attend to all, or to themselves and those before."""
        b, t, _ = x.shape
        q, k, v = (project(x).reshape(b, t, self.num_heads, -1) for project in (self.q, self.k, self.v))
        later = jnp.where(np.tri(t, dtype=bool), 0.0, -jnp.inf)[None, None] if self.causal else None
        return self.out(softmax_attention(q, k, v, bias=later))


class CLIPText(nnx.Module):
    """ids int32 [b, t] -> pooled [b, hidden_size] in `dtype`. ValueError when t is more than max_positions."""

    def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.position_embedding = Embedding(config.max_positions, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = stack(CLIPLayer, config.num_layers, config, dtype=dtype, rngs=rngs)
        self.final_norm = LayerNorm(config.hidden_size, eps=config.eps, dtype=dtype)

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b d"]:
        t = ids.shape[1]
        if t > self.config.max_positions:
            raise ValueError(f"{t} tokens do not fit into CLIP's {self.config.max_positions} positions")
        x = self.token_embedding(ids) + self.position_embedding.weight[:t][None]
        x, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)
        # Causal, so nothing behind the end-of-text token has reached it: pooling first spares the norm the other rows.
        pooled = jnp.take_along_axis(x, self.end_of_text(ids)[:, None, None], axis=1)[:, 0]
        return self.final_norm(pooled)

    def end_of_text(self, ids: Int[Array, "b t"]) -> Int[Array, " b"]:
        """Position of the first end-of-text token.

        The published configs say eos_token_id = 2, which no tokenizer emits: there it is the row's largest id.
        """
        if self.config.eos_token_id == 2:
            return jnp.argmax(ids, axis=1)
        return jnp.argmax(ids == self.config.eos_token_id, axis=1)
