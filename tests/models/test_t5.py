"""The T5 encoder against transformers' T5EncoderModel, through the converter, and what training needs of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_model
from flax import nnx

from flux_jax.config import T5Config, dev
from flux_jax.models.t5 import T5Encoder, relative_position_buckets

BF16 = 3e-2  # relative RMS error: rounding to 8 bits in each of a few layers
SMALL = T5Config(
    vocab_size=96, d_model=48, d_ff=80, num_heads=3, head_dim=16, num_layers=3, num_buckets=8, max_distance=20
)


def random_ids(config, batch, length):
    """Ids [batch, length] whose last third is padding."""
    ids = np.random.default_rng(7).integers(3, config.vocab_size, (batch, length)).astype(np.int32)
    ids[:, -(length // 3) :] = 0
    return ids


run = jax.jit(lambda model, ids: model(ids))


def encode(model, ids):
    return np.asarray(run(model, jnp.asarray(ids)))


def filled():
    return tiny_model.filled(nnx.eval_shape(lambda: T5Encoder(SMALL, rngs=nnx.Rngs(0))), np.random.default_rng(0))


def reference_and_ours(t5_config):
    torch_reference = pytest.importorskip("torch_reference")
    from published import load_module

    config = dataclasses.replace(torch_reference.tiny(), t5=t5_config)
    reference = torch_reference.build("t5", config)
    ours = load_module("t5", config, torch_reference.state_dict_numpy(reference), jnp.float32)
    return lambda ids: torch_reference.run_t5(reference, ids), ours, reference


@pytest.mark.reference
@pytest.mark.parametrize(
    ("changes", "batch", "length"),
    [
        ({}, 2, 41),  # longer than max_distance, so that the last buckets are used
        ({}, 1, 1),
        ({"num_buckets": 32, "max_distance": 128}, 1, 200),
        ({"num_layers": 1, "head_dim": 8}, 3, 16),  # heads narrower than d_model together
        ({"eps": 1e-2}, 2, 9),
    ],
)
def test_equals_transformers(changes, batch, length):
    config = dataclasses.replace(SMALL, **changes)
    reference, ours, _ = reference_and_ours(config)
    ids = random_ids(config, batch, length)
    expected, actual = reference(ids), encode(ours, ids)
    parity.check("T5", actual, expected)


@pytest.mark.reference
def test_position_bias_equals_transformers_at_published_size():
    published = dev().t5
    config = dataclasses.replace(SMALL, num_buckets=published.num_buckets, max_distance=published.max_distance)
    _, ours, reference = reference_and_ours(config)
    attention = reference.encoder.block[0].layer[0].SelfAttention
    buckets = relative_position_buckets(512, config.num_buckets, config.max_distance)
    actual = np.asarray(ours.relative_attention_bias.weight[...])[buckets].transpose(2, 0, 1)
    np.testing.assert_array_equal(actual, attention.compute_bias(512, 512)[0].numpy())


def test_position_buckets():
    buckets = relative_position_buckets(300, 32, 128)
    np.testing.assert_array_equal(buckets[20, 13:28], [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23])
    assert buckets[0, 128:].tolist() == [31] * 172
    assert buckets[299, 0] == 15
    assert (np.diff(buckets[:, 0]) >= 0).all()


def test_bfloat16_stays_close_to_float32():
    ids = random_ids(SMALL, 2, 24)
    exact = filled()
    expected, actual = encode(exact, ids), encode(jax.tree.map(lambda p: p.astype(jnp.bfloat16), exact), ids)
    assert actual.dtype == jnp.bfloat16
    error = actual.astype(np.float32) - expected
    assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < BF16


def test_every_weight_learns():
    """One gradient through the scanned layers: finite everywhere and zero nowhere but in unused embeddings."""
    encoder = filled()
    ids = jnp.asarray(random_ids(SMALL, 2, 24))
    target = jax.random.normal(jax.random.key(1), (2, 24, SMALL.d_model))
    graph, state = nnx.split(encoder)
    gradient = jax.jit(jax.grad(lambda s: jnp.mean((nnx.merge(graph, s)(ids) - target) ** 2)))(state)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        leaf = np.asarray(leaf)
        assert np.isfinite(leaf).all(), path
        per_layer = (
            leaf.reshape(SMALL.num_layers, -1) if "layers" in jax.tree_util.keystr(path) else leaf.reshape(1, -1)
        )
        assert (np.abs(per_layer).max(axis=1) > 0).all(), path


def test_a_new_model_tells_tokens_apart():
    """At initialisation neither the residual stream nor the unscaled attention drowns the token's own embedding."""
    encoder = T5Encoder(SMALL, rngs=nnx.Rngs(0))
    encoded = encode(encoder, np.arange(SMALL.vocab_size)[None])[0]
    embedded = np.asarray(encoder.token_embedding.weight[...])
    correlation = np.sum(encoded * embedded, 1) / np.linalg.norm(encoded, axis=1) / np.linalg.norm(embedded, axis=1)
    assert np.median(correlation) > 0.5


def test_layers_are_stacked():
    state = nnx.state(nnx.eval_shape(lambda: T5Encoder(dev().t5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))), nnx.Param)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()) == 9_524_621_312  # published with FLUX.1
    wo = next(leaf for name, leaf in leaves.items() if "layers.wo.weight" in name)
    assert wo.shape == (24, 4096, 10240)
