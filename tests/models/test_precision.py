"""float32 means float32: each product of float32 operands in the programs of every part asks for full precision; a GPU
would else round them to 10 bits (TF32).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from flux_jax.distill.options import Options
from flux_jax.distill.student import student_of
from flux_jax.models.attention import rope_cos_sin
from flux_jax.models.quantize import quantize_transformer
from flux_jax.sampling.schedule import position_ids
from pallas_kernels import Target, compiling_for, pack_ternary, ternary_matmul
from pallas_kernels.epilogues import Gelu
from pallas_kernels.fused import fused_matmul

GPU = Target("gpu", "9.0", "NVIDIA H100")
PRODUCTS = ("dot_general", "conv_general_dilated")
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def equations(jaxpr):
    """All of a program: of its loops, branches, gradients and kernels, too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(function, *args):
    """The equations of a program for a GPU, which is not needed to trace it."""
    with compiling_for(GPU):
        return list(
            equations(jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr)
        )  # never what was traced before


def check(function, *args, count):
    """count: the products of float32 in it, fewer than which a walk sees only where it is blind."""
    products = [e for e in traced(function, *args) if e.primitive.name in PRODUCTS]
    wide = [e for e in products if {v.aval.dtype for v in e.invars} == {jnp.dtype(jnp.float32)}]
    assert [str(e) for e in wide if e.params["precision"] != HIGHEST] == []
    assert len(wide) >= count


@pytest.fixture(scope="module")
def modules():
    return tiny_model.modules(tiny_model.config())


def velocity(transformer, img, txt, pooled):
    """Of 2 x 3 image tokens and 5 of text."""
    modulation = transformer.modulation(jnp.full(1, 0.7), jnp.full(1, 3.5), pooled)
    rope = rope_cos_sin(position_ids(2, 3, 5), transformer.config.axes_dim, transformer.config.theta)
    return transformer(img, txt, modulation, jnp.asarray(rope))


def inputs(config):
    return jnp.ones((1, 6, config.in_channels)), jnp.ones((1, 5, config.text_dim)), jnp.ones((1, config.pooled_dim))


# 10 linears outside of the blocks, 13 in a block of each kind, and two products of each of their attentions.
@pytest.mark.parametrize(
    ("weights", "count"),
    [
        ("dense", 27),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bf16", 27), ("int8", 14), ("student", 27))),
    ],
)
def test_transformer(modules, weights, count):
    """Dense, ternary with either kind of activations (int8 are not products of float32), and while it learns."""
    transformer = nnx.clone(modules["transformer"])
    if weights == "student":
        transformer = student_of(transformer, "", dataclasses.replace(Options(), products="float32"))
    elif weights != "dense":
        transformer = quantize_transformer(transformer, activations=weights)

    def loss(transformer, *args):
        return jnp.square(velocity(transformer, *args)).sum()

    check(jax.value_and_grad(loss, (1, 2, 3)), transformer, *inputs(transformer.config), count=count)


def test_text_encoders(modules):
    ids = jnp.ones((1, 8), jnp.int32)
    for part, count in (("t5", 9), ("clip", 8)):  # 7 or 6 linears of a layer, and its attention
        check(lambda module, ids: module(ids), modules[part], ids, count=count)


@pytest.mark.parametrize("strip_bytes", [None, 1 << 12])
def test_autoencoder(modules, strip_bytes):
    """At least two convolutions for each residual block, of which the decoder has 10 and the encoder 6."""
    latents, images = jnp.ones((1, 4, 8, 16)), jnp.ones((1, 32, 64, 3))
    check(lambda vae, x: vae.decode(x, strip_bytes), modules["vae"], latents, count=26)
    check(lambda vae, x: vae.encode(x), modules["vae"], images, count=18)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_kernels(implementation):
    """The product, its gradient, and a product with an epilogue."""
    packed = pack_ternary(np.random.default_rng(0).integers(-1, 2, (48, 128), np.int8))
    how = {"implementation": implementation}

    def plain(x, scale):
        return ternary_matmul(x, packed, scale, **how).sum()

    def finished(x, scale):
        return fused_matmul(x, None, jnp.asarray(packed), scale, None, Gelu(), **how)

    for program in (plain, jax.grad(plain), finished):
        check(program, jnp.ones((8, 128)), jnp.ones(48), count=1)


def test_what_is_no_float32_is_as_it_was(modules, monkeypatch):
    """bfloat16 is given no precision, and cuDNN still computes its attention, which is not here."""
    by = []

    def fused_attention(q, k, v, *, implementation):
        by.append(implementation)
        return q + k + v

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused_attention)
    transformer, *args = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), (modules["transformer"], *inputs(modules["transformer"].config))
    )
    found = traced(velocity, transformer, *args)
    products = [e for e in found if e.primitive.name in PRODUCTS]
    assert len(products) >= 20
    assert {e.params["precision"] for e in products} == {None}
    assert set(by) == {"cudnn"}
