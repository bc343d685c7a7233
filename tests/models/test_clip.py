"""The CLIP text tower against transformers' CLIPTextModel, through the converter, and what it pools."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_model
from flax import nnx

from flux_jax.config import CLIPConfig, dev
from flux_jax.models.clip import CLIPText

BF16 = 3e-2  # relative RMS error: rounding to 8 bits in each of a few layers
SMALL = CLIPConfig(vocab_size=96, hidden_size=24, mlp_dim=40, num_heads=3, num_layers=2, max_positions=20)


def random_ids(config, lengths, total):
    """Ids [len(lengths), total]: row i ends at lengths[i] and is padded with the end token, as for FLUX."""
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = np.random.default_rng(7).integers(8, config.vocab_size - 1, (len(lengths), total)).astype(np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = end
    return ids


run = jax.jit(lambda model, ids: model(ids))


def filled(config):
    return tiny_model.filled(nnx.eval_shape(lambda: CLIPText(config, rngs=nnx.Rngs(0))), np.random.default_rng(0))


def pooled(model, ids):
    return np.asarray(run(model, jnp.asarray(ids)))


@pytest.mark.reference
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [2, 5])
@pytest.mark.parametrize(
    ("lengths", "total"),
    [((4, 19, 11), 20), *(pytest.param(*case, marks=pytest.mark.slow) for case in (((0,), 1), ((6,), 13)))],
)
def test_equals_transformers(activation, eos_token_id, lengths, total):
    torch_reference = pytest.importorskip("torch_reference")
    from published import load_module

    clip = dataclasses.replace(SMALL, activation=activation, eos_token_id=eos_token_id)
    config = dataclasses.replace(torch_reference.tiny(), clip=clip)
    reference = torch_reference.build("clip", config)
    ours = load_module("clip", config, torch_reference.state_dict_numpy(reference), jnp.float32)
    ids = random_ids(clip, lengths, total)
    expected, actual = torch_reference.run_clip(reference, ids), pooled(ours, ids)
    end = "end of text: largest id" if eos_token_id == 2 else "end of text: its own id"
    parity.check(f"CLIP, {end}", actual, expected)


@pytest.mark.parametrize("eos_token_id", [2, 5])
def test_pools_at_the_first_end_of_text(eos_token_id):
    config = dataclasses.replace(SMALL, eos_token_id=eos_token_id)
    model = filled(config)
    ids = random_ids(config, (4, 9), 20)
    np.testing.assert_array_equal(model.end_of_text(jnp.asarray(ids)), [4, 9])
    behind = ids.copy()
    behind[:, 15:] = 8
    np.testing.assert_array_equal(pooled(model, behind), pooled(model, ids))
    before = ids.copy()
    before[:, 2] = 7
    assert (np.abs(pooled(model, before) - pooled(model, ids)).max(axis=1) > 0).all()


def test_more_tokens_than_positions_are_refused(snapshot_message):
    model = filled(SMALL)
    with snapshot_message.raises(ValueError, 21, 20):
        model(jnp.zeros((1, 21), jnp.int32))


def test_bfloat16_stays_close_to_float32():
    ids = random_ids(SMALL, (4, 19, 11), 20)
    exact = filled(SMALL)
    expected, actual = pooled(exact, ids), pooled(jax.tree.map(lambda p: p.astype(jnp.bfloat16), exact), ids)
    assert actual.dtype == jnp.bfloat16
    actual = actual.astype(np.float32)
    assert np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)) < BF16


def test_published_size():
    state = nnx.state(nnx.eval_shape(lambda: CLIPText(dev().clip, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 123_060_480  # clip-vit-large-patch14's text model
