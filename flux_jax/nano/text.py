"""FLUX-nano's text encoders, trained on captions alone, before the pictures: FLUX's, too, were there before FLUX.

In: a `Dataset`, of which only captions and their meanings are read. Out: T5 and CLIP, which every later phase leaves as
they are. Two linear readers, thrown away in the end, must tell what the caption says of the objects it names (shape,
colour, number, place): one from T5's token of each noun, one from CLIP's pooled vector. So a noun comes to carry its
own colour, number and place, and the order of words is learned in minutes; from pictures it is learned last, in hours.
One reader serves all nouns, so what it learns of colours with one shape it knows with another.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.config import FluxConfig
from flux_jax.io.atomic import write_whole
from flux_jax.models.clip import CLIPText
from flux_jax.models.layers import Linear
from flux_jax.models.t5 import T5Encoder
from flux_jax.nano import training
from flux_jax.nano.captions import MEANINGS, NOUNS, evaluation_captions, meaning
from flux_jax.nano.dataset import Dataset
from flux_jax.nano.training import Recipe
from flux_jax.training.mixed_precision import use_mixed_products


class TextEncoders(nnx.Module):
    """T5 and CLIP: ids [b, k], [b, p] -> (text [b, k, d_model], pooled [b, hidden_size])."""

    def __init__(self, config: FluxConfig, rngs: nnx.Rngs):
        self.t5 = T5Encoder(config.t5, rngs=rngs)
        self.clip = CLIPText(config.clip, rngs=rngs)

    def __call__(
        self, t5_ids: Int[Array, "b k"], clip_ids: Int[Array, "b p"]
    ) -> tuple[Float[Array, "b k d"], Float[Array, "b h"]]:
        return self.t5(t5_ids), self.clip(clip_ids)


class Readers(nnx.Module):
    """Both encoders, and a linear reader behind each. nouns: T5's ids of `captions.NOUNS`."""

    def __init__(self, config: FluxConfig, nouns: tuple[int, ...], rngs: nnx.Rngs):
        self.encoders = TextEncoders(config, rngs)
        self.nouns = nouns
        self.t5 = Linear(config.t5.d_model, sum(MEANINGS), rngs=rngs)
        self.clip = Linear(config.clip.hidden_size, 2 * sum(MEANINGS), rngs=rngs)
        use_mixed_products(self)

    def __call__(self, t5_ids: Int[Array, "b k"], clip_ids: Int[Array, "b p"]) -> Float[Array, "2 b 2 a"]:
        """Logits of the answers, `captions.MEANINGS` behind one another, by T5 and by CLIP, for the first and the
        second object. Of a second object that is not named, T5's mean nothing."""
        text, pooled = self.encoders(t5_ids, clip_ids)
        is_noun = jnp.isin(t5_ids, jnp.array(self.nouns))
        order = jnp.where(is_noun, jnp.cumsum(is_noun, -1), 0)
        tokens = jnp.stack([jnp.argmax(order == number, -1) for number in (1, 2)], -1)
        named = jnp.take_along_axis(text, tokens[..., None], 1)
        return jnp.stack([self.t5(named), self.clip(pooled).reshape(len(pooled), 2, -1)])


@dataclasses.dataclass(frozen=True)
class ReadingLoss:
    """Cross-entropy of the answers, in nats per caption, T5's plus CLIP's."""

    def __call__(self, readers: Readers, batch: dict, key: Array, constants: dict):
        logits, loss = readers(batch["t5"], batch["clip"]), jnp.float32(0)
        asked = jnp.stack([batch["meaning"][..., 0] > 0, jnp.ones(batch["meaning"].shape[:2], bool)])
        for index, answers in enumerate(questions(logits)):
            right = batch["meaning"][None, ..., index, None].astype(jnp.int32)
            log_shares = jnp.take_along_axis(jax.nn.log_softmax(answers), right, -1)[..., 0]
            loss -= jnp.where(asked, log_shares, 0).sum((0, 2)).mean()
        return loss, loss


def questions(logits: Float[Array, "2 b 2 a"]) -> list[Float[Array, "2 b 2 k"]]:
    """The logits of each question of `captions.MEANINGS`."""
    return jnp.split(logits, np.cumsum(MEANINGS[:-1]).tolist(), -1)


def noun_ids(tokenizers: Tokenizers) -> tuple[int, ...]:
    return tuple(tokenizers.t5(list(NOUNS))[:, 0].tolist())


def understood(readers: Readers, tokenizers: Tokenizers) -> dict[str, float]:
    """The share of the evaluation captions, which training never has, that each reader reads without a fault."""
    captions = evaluation_captions()
    texts, answers = [caption.text for caption in captions], np.stack([meaning(caption) for caption in captions])
    logits = jax.jit(lambda readers, *ids: readers(*ids))(readers, tokenizers.t5(texts), tokenizers.clip(texts))
    right = (np.stack([np.argmax(part, -1) for part in questions(logits)], -1) == answers).all(-1)
    right[0] |= answers[..., 0] == 0
    return dict(zip(("t5", "clip"), right.all(-1).mean(-1).round(4).tolist(), strict=True))


def train(folder: Path, config: FluxConfig, recipe: Recipe, dataset: Dataset, tokenizers: Tokenizers) -> None:
    """Trains both encoders in `folder`, and writes `understood.json` there."""
    readers = Readers(config, noun_ids(tokenizers), nnx.Rngs(recipe.seed))
    shares = understood(training.train(folder, recipe, readers, dataset, ReadingLoss()), tokenizers)
    write_whole(folder / "understood.json", (json.dumps(shares) + "\n").encode(), overwrite=True)
    print(f"held-out captions whose whole meaning is read: {shares}")
