"""The transformer against diffusers' FluxTransformer2DModel, through the converter; its blocks at FLUX.1's width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from flux_jax.config import TransformerConfig, dev, nano
from flux_jax.models.attention import rope_cos_sin
from flux_jax.models.transformer import Transformer, timestep_embedding
from flux_jax.sampling.schedule import position_ids

FULL_WIDTH = 1e-4  # the same for sums of 3,072 to 15,360 products
BF16 = 2e-2  # relative RMS error of the velocity: 8 bits of mantissa through every layer

forward = jax.jit(lambda model, img, txt, t, guidance, pooled, rope: model(
    img, txt, model.modulation(t, guidance, pooled), rope
))  # fmt: skip


def inputs(config: TransformerConfig, batch: int, rows: int, columns: int, text: int):
    rng = np.random.default_rng(11)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    ids = position_ids(rows, columns, text)
    return {
        "img": normal(batch, rows * columns, config.in_channels),
        "txt": normal(batch, text, config.text_dim),
        "pooled": normal(batch, config.pooled_dim),
        "t": rng.uniform(0, 1, batch).astype(np.float32),
        "guidance": rng.uniform(1, 6, batch).astype(np.float32) if config.guidance_embeds else None,
        "ids": ids,
        "rope": rope_cos_sin(ids, config.axes_dim, config.theta),
    }


def both(config, x, dtype=jnp.float32, change=lambda module: None):
    """(diffusers' velocity in float32, ours in `dtype`) for the same random weights, `change`d, and inputs."""
    reference = pytest.importorskip("torch_reference")
    from published import load_module

    module = reference.build("transformer", config)
    change(module)
    ours = load_module("transformer", config, reference.state_dict_numpy(module), dtype)
    text = x["txt"].shape[1]
    expected = reference.run_transformer(
        module, x["img"], x["txt"], x["pooled"], x["t"], x["ids"][text:], x["ids"][:text], x["guidance"]
    )
    cast = {name: jnp.asarray(x[name], dtype) for name in ("img", "txt", "pooled")}
    guidance = None if x["guidance"] is None else jnp.asarray(x["guidance"])
    args = cast["img"], cast["txt"], jnp.asarray(x["t"]), guidance, cast["pooled"], jnp.asarray(x["rope"])
    return expected, np.asarray(forward(ours, *args).astype(jnp.float32))


@pytest.mark.reference
@pytest.mark.parametrize(
    ("guidance", "batch", "rows", "columns", "text"),
    [(True, 1, 4, 4, 8), (False, 1, 4, 4, 8), (True, 2, 3, 7, 13), (False, 2, 6, 2, 1)],
)
def test_velocity_equals_diffusers(guidance, batch, rows, columns, text):
    config = pytest.importorskip("torch_reference").tiny(guidance)
    expected, actual = both(config, inputs(config.transformer, batch, rows, columns, text))
    name = "dev" if guidance else "schnell"
    case = f"transformer, {name}, batch {batch}, {rows} x {columns} image and {text} text tokens"
    parity.check(case, actual, expected)


@pytest.mark.reference
def test_norms_of_small_activations():
    """Where the variance is near the norms' epsilon, its value shows."""

    def shrink(module):
        for name, value in module.state_dict().items():
            if any(part in name for part in ("x_embedder", "context_embedder", "to_q", "to_k", "add_q", "add_k")):
                value.mul_(1e-3)

    config = pytest.importorskip("torch_reference").tiny()
    expected, actual = both(config, inputs(config.transformer, 1, 4, 4, 8), change=shrink)
    parity.check("transformer, activations near the norms' epsilon", actual, expected)


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize(("double", "single"), [(1, 0), (0, 1)], ids=["double block", "single block"])
def test_one_block_at_full_width(double, single):
    reference = pytest.importorskip("torch_reference")
    full = dataclasses.replace(dev().transformer, num_double_blocks=double, num_single_blocks=single)
    config = dataclasses.replace(reference.tiny(), transformer=full)
    expected, actual = both(config, inputs(full, 1, 4, 3, 9))
    parity.check(f"one {'double' if double else 'single'} block at FLUX.1's width", actual, expected, FULL_WIDTH)


@pytest.mark.reference
def test_sinusoidal_equals_diffusers():
    reference = pytest.importorskip("torch_reference")
    t = np.random.default_rng(3).uniform(0, 6, 100).astype(np.float32)
    actual = np.asarray(jax.jit(lambda t: timestep_embedding(t, 256))(t))
    frequencies = 10_000.0 ** (-np.arange(128) / 128)
    one_bit = 1000 * t[:, None] * frequencies * 2.0**-22  # of a frequency, as an angle
    error = np.abs(actual - reference.run_timesteps(1000 * t))
    assert (error <= np.tile(one_bit, 2) + 1e-6).all()


@pytest.mark.reference
def test_bf16_velocity_is_close_to_float32():
    config = pytest.importorskip("torch_reference").tiny()
    expected, actual = both(config, inputs(config.transformer, 2, 6, 6, 12), jnp.bfloat16)
    error = np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean())
    parity.note("velocity in bf16, relative RMS", error, BF16)


def test_bf16_keeps_norms_and_positions_in_float32():
    """The residual stream is bf16 as in FLUX; what needs more bits gets them: norms, rotary turns, the softmax."""
    config = nano().transformer
    model = nnx.eval_shape(lambda: Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    x = {k: v for k, v in inputs(config, 1, 2, 2, 4).items() if k != "ids"}
    bf16 = {k: jnp.asarray(x[k], jnp.bfloat16) for k in ("img", "txt", "pooled")}
    jaxpr = str(
        jax.make_jaxpr(forward)(model, bf16["img"], bf16["txt"], x["t"], x["guidance"], bf16["pooled"], x["rope"])
    )
    for operation in ("rsqrt", "exp", "cos", "sin"):
        rows = [line for line in jaxpr.splitlines() if f" = {operation}" in line]
        assert rows, operation
        assert all(":f32" in line for line in rows), (operation, rows)


def test_guidance_is_required_where_it_is_embedded(snapshot_message):
    def modulation():
        return Transformer(nano().transformer, rngs=nnx.Rngs(0)).modulation(jnp.zeros(1), None, jnp.zeros((1, 64)))

    with snapshot_message.raises(ValueError, "guidance"):
        nnx.eval_shape(modulation)
