"""FLUX-nano's transformer, trained on rendered scenes, behind text encoders that know the captions already.

Phase `flow` minimises |v(x_t, t, text) - (noise - x)|^2 with x_t = (1 - t) x + t noise (rectified flow, arXiv
2403.03206); one caption in ten is empty, so that the model also knows the unconditional velocity. Beside it, a head on
the image stream behind the double blocks, which is thrown away in the end, learns what the finished picture shows at
each token: so the first blocks learn early to plan a picture (the idea of REPA, arXiv 2410.06940, with the renderer's
own truth in place of a pretrained encoder).

Phase `guidance` then teaches the guidance input g what two evaluations give, v(empty) + g (v(text) - v(empty)) (arXiv
2210.03142).

In: batches of a `Dataset`; and, as constants of the training, `encoders` (text.TextEncoders), `rope`, the ids of no
prompt `empty`, and for guidance the `teacher`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from flux_jax.config import FluxConfig
from flux_jax.models.layers import Linear
from flux_jax.models.transformer import MLPEmbedder, Transformer
from flux_jax.nano.dataset import Dataset
from flux_jax.nano.scenes import COLORS, SHAPES
from flux_jax.nano.text import TextEncoders
from flux_jax.nano.training import Recipe
from flux_jax.sampling.schedule import rope_table, shift_mu
from flux_jax.training.mixed_precision import use_mixed_products

NO_GUIDANCE = 1.0  # the guidance input that stands for the plain conditional velocity


class Networks(nnx.Module):
    """What is trained: the transformer, and the layout head that only training has."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.transformer = Transformer(config.transformer, rngs=rngs)
        width = config.transformer.hidden_size
        self.layout_head = MLPEmbedder(width, 2 * width, rngs=rngs)
        self.layout_classes = Linear(2 * width, len(SHAPES) + 1 + len(COLORS) + 1, rngs=rngs)
        # Every block starts as the identity and the velocity as zero (adaLN-Zero, DiT section 3.2).
        blocks = self.transformer
        linears = (blocks.double_blocks.img.mod, blocks.double_blocks.txt.mod, blocks.single_blocks.mod)
        for linear in (*linears, blocks.final_layer.mod, blocks.final_layer.linear):
            linear.weight[...] = jnp.zeros_like(linear.weight[...])
        self.transformer.unroll = True
        use_mixed_products(self)

    def __call__(
        self,
        x: Float[Array, "b i c"],
        t: Float[Array, " b"],
        guidance: Float[Array, " b"],
        encoded: tuple[Float[Array, "b k d"], Float[Array, "b h"]],
        rope: Float[Array, "2 n r"],
    ) -> tuple[Float[Array, "b i c"], Float[Array, "b i k"]]:
        """(velocity, layout): of each token, the logits of no shape and each shape, of no colour and each colour.
        encoded: what the text encoders give."""
        text, pooled = encoded
        modulation = self.transformer.modulation(t, guidance, pooled)
        img, txt = self.transformer.double_stage(x, text, modulation, rope)
        layout = self.layout_classes(jax.nn.silu(self.layout_head(jax.nn.standardize(img))))
        return self.transformer.single_stage(img, txt, modulation, rope), layout


def constants(config: FluxConfig, encoders: TextEncoders, dataset: Dataset) -> dict[str, Any]:
    """What both losses need at every step."""
    rope = jnp.asarray(rope_table(config.transformer, *config.default_grid, config.sampling.max_sequence_length))
    return {"encoders": encoders, "rope": rope, "empty": (dataset.empty_t5, dataset.empty_clip)}


def noised(
    x: Float[Array, "b i c"], key: Array, config: FluxConfig
) -> tuple[Float[Array, " b"], Float[Array, "b i c"], Float[Array, "b i c"], Array]:
    """(t, noise, x_t = (1 - t) x + t noise, a key for further draws): t in (0, 1) is logit-normal (arXiv 2403.03206,
    section 3.1), shifted as the sampler's schedule is."""
    keys = jax.random.split(key, 3)
    mu = shift_mu(config.sampling, math.prod(config.default_grid))
    t = jax.nn.sigmoid(mu + jax.random.normal(keys[0], (len(x),)))
    noise = jax.random.normal(keys[1], x.shape)
    share = t[:, None, None]
    return t, noise, (1 - share) * x + share * noise, keys[2]


@dataclasses.dataclass(frozen=True)
class FlowLoss:
    """(what is minimised, mean squared error of the velocity) on a batch; see the module's docstring."""

    config: FluxConfig
    recipe: Recipe

    def __call__(self, networks: Networks, batch: dict[str, Array], key: Array, constants: dict[str, Any]):
        size = len(batch["tokens"])
        t, noise, x, key = noised(batch["tokens"], key, self.config)
        dropped = jax.random.bernoulli(key, self.recipe.dropout, (size, 1))
        empty_t5, empty_clip = constants["empty"]
        encoded = constants["encoders"](
            jnp.where(dropped, empty_t5, batch["t5"]), jnp.where(dropped, empty_clip, batch["clip"])
        )
        velocity, layout = networks(x, t, jnp.full(size, NO_GUIDANCE), encoded, constants["rope"])
        loss = jnp.square(velocity - (noise - batch["tokens"])).mean()
        return loss + self.recipe.layout_weight * layout_loss(layout, batch["layout"]), loss


def layout_loss(logits: Float[Array, "b i k"], layout: UInt8[Array, "b i s"]) -> Float[Array, ""]:
    """Cross-entropy of shapes plus that of colours, in nats per token; each class's share of the token's square (and
    nothing's, the rest) is its probability."""

    def cross_entropy(logits, share):
        share = jnp.concatenate([1 - share.sum(-1, keepdims=True), share], -1)
        return -(share * jax.nn.log_softmax(logits)).sum(-1).mean()

    shapes, colors = jnp.split(layout.astype(jnp.float32) / 255, [len(SHAPES)], -1)
    return cross_entropy(logits[..., : len(SHAPES) + 1], shapes) + cross_entropy(logits[..., len(SHAPES) + 1 :], colors)


@dataclasses.dataclass(frozen=True)
class GuidanceLoss:
    """(loss, loss): mean squared error against the teacher's guided velocity, at a random guidance for each example."""

    config: FluxConfig
    recipe: Recipe

    def __call__(self, networks: Networks, batch: dict[str, Array], key: Array, constants: dict[str, Any]):
        size = len(batch["tokens"])
        t, _, x, key = noised(batch["tokens"], key, self.config)
        guidance = jax.random.uniform(key, (size,), minval=NO_GUIDANCE, maxval=self.recipe.guidance_max)
        encoders, rope, plain = constants["encoders"], constants["rope"], jnp.full(size, NO_GUIDANCE)
        encoded = encoders(batch["t5"], batch["clip"])
        empty = jax.tree.map(lambda e: jnp.broadcast_to(e, (size, *e.shape[1:])), encoders(*constants["empty"]))
        conditional, _ = constants["teacher"](x, t, plain, encoded, rope)
        unconditional, _ = constants["teacher"](x, t, plain, empty, rope)
        target = unconditional + guidance[:, None, None] * (conditional - unconditional)
        velocity, _ = networks(x, t, guidance, encoded, rope)
        loss = jnp.square(velocity - target).mean()
        return loss, loss
