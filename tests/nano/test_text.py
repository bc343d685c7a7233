"""The text encoders' phase: readers read where they should, the loss is what it says, it is learned."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.config import CLIPConfig, T5Config, nano
from flux_jax.nano import text, training
from flux_jax.nano.captions import MEANINGS, NOUNS, VOCABULARY, meaning, parse
from flux_jax.nano.dataset import Dataset
from flux_jax.nano.training import Recipe
from flux_jax.nano.vocabulary import build

pytestmark = pytest.mark.usefixtures("hasty_compiler")
SMALL = dataclasses.replace(
    nano(),
    t5=T5Config(vocab_size=256, d_model=16, d_ff=32, num_heads=2, head_dim=8, num_layers=2, max_distance=32),
    clip=CLIPConfig(
        vocab_size=512, hidden_size=16, mlp_dim=32, num_heads=2, num_layers=2, max_positions=16, eos_token_id=2
    ),
)
TEXTS = ["a red circle above a blue star", "Three green diamonds.", "a cross", "a square to the left of a cross"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    build(folder, VOCABULARY, SMALL)
    return Tokenizers.load(folder, SMALL)


@pytest.fixture(scope="module")
def readers(tokenizers):
    return nnx.jit(lambda: text.Readers(SMALL, text.noun_ids(tokenizers), nnx.Rngs(0)))()


def meanings():
    return np.stack([meaning(caption) for caption in map(parse, TEXTS) if caption])


def test_every_noun_is_one_token(tokenizers):
    ids = text.noun_ids(tokenizers)
    assert len(set(ids)) == len(NOUNS)
    assert not set(ids) & set(tokenizers.t5(["a red to the left of and three"])[0].tolist())


def test_t5s_reader_sees_each_noun_at_its_own_token(tokenizers, readers):
    """By hand: the place of the word in the caption ("Three" is spelt in six tokens: a space and five letters)."""
    t5, clip = tokenizers.t5(TEXTS), tokenizers.clip(TEXTS)
    logits = readers(jnp.asarray(t5), jnp.asarray(clip))
    assert logits.shape == (2, len(TEXTS), 2, sum(MEANINGS))
    tokens = readers.encoders.t5(jnp.asarray(t5))
    for row, (first, second) in enumerate([(2, 6), (7, None), (1, None), (1, 7)]):
        for slot, place in enumerate((first, second)):
            if place is not None:
                np.testing.assert_allclose(logits[0, row, slot], readers.t5(tokens[row, place]), atol=1e-4)


def test_loss_is_the_log_of_the_right_answers_share(tokenizers, readers):
    """Readers that answer nothing in particular: the log of the number of answers, over all objects that are asked."""
    silent = nnx.clone(readers)
    for linear in (silent.t5, silent.clip):
        linear.weight[...] = jnp.zeros_like(linear.weight[...])
        linear.bias[...] = jnp.zeros_like(linear.bias[...])
    batch = {"t5": tokenizers.t5(TEXTS), "clip": tokenizers.clip(TEXTS), "meaning": meanings()}
    batch = jax.tree.map(jnp.asarray, batch)
    loss, _ = text.ReadingLoss()(silent, batch, jax.random.key(0), {})
    one_object = sum(np.log(MEANINGS))
    assert float(loss) == pytest.approx(one_object * (6 / 4 + 2), rel=1e-5)


@pytest.mark.slow
def test_the_encoders_learn_to_tell_the_meaning(tmp_path, tokenizers):
    """Four captions by heart, both readers; and the file that says how many of the held-out ones they read."""
    n = len(TEXTS)
    empty = np.zeros((n, 1, 1))
    t5, clip = tokenizers.t5(TEXTS), tokenizers.clip(TEXTS)
    dataset = Dataset(empty, empty, meanings(), t5, clip, tokenizers.t5([""]), tokenizers.clip([""]))
    recipe = Recipe(steps=60, batch=8, learning_rate=1e-2, warmup=5, ema=0.5)
    text.train(tmp_path, SMALL, recipe, dataset, tokenizers)
    assert set(json.loads((tmp_path / "understood.json").read_text())) == {"t5", "clip"}
    readers = training.averaged(tmp_path, text.Readers(SMALL, text.noun_ids(tokenizers), nnx.Rngs(1)))
    loss, _ = text.ReadingLoss()(readers, jax.tree.map(jnp.asarray, dataset.batch(0, 0, 16)), jax.random.key(0), {})
    assert float(loss) < 0.1
