"""float32 means float32: in the programs of every part, each product of float32 operands asks for full precision, where
a GPU would else round them to 10 bits (TF32).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from flux_jax.distill.options import Options
from flux_jax.distill.student import student_of
from flux_jax.models.attention import rotary
from flux_jax.quantize import quantize_transformer
from flux_jax.sampling import position_ids
from pallas_kernels import Target, compiling_for, fused, pack_ternary, ternary_matmul

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


def products(function, *args):
    """(inside a kernel, equation) of each product of float32 operands."""
    jaxpr = jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr  # a new function: nothing was traced before
    wide = [e for e in equations(jaxpr) if e.primitive.name in PRODUCTS]
    return [e for e in wide if e.invars[0].aval.dtype == e.invars[1].aval.dtype == jnp.float32]


def check(function, *args, at_least):
    """at_least: how many products there are, so that no walk that sees nothing passes."""
    found = products(function, *args)
    assert len(found) >= at_least
    assert [str(e) for e in found if e.params["precision"] != HIGHEST] == []


@pytest.fixture
def target():
    with compiling_for(GPU):
        yield


@pytest.fixture(scope="module")
def modules():
    return tiny_model.modules(tiny_model.config())


def velocity(transformer, img, txt, pooled):
    """Of 2 x 3 image tokens and 5 of text."""
    modulation = transformer.modulation(jnp.full(1, 0.7), jnp.full(1, 3.5), pooled)
    rope = rotary(position_ids(2, 3, 5), transformer.config.axes_dim, transformer.config.theta)
    return transformer(img, txt, modulation, jnp.asarray(rope))


def inputs(config):
    return jnp.ones((1, 6, config.in_channels)), jnp.ones((1, 5, config.text_dim)), jnp.ones((1, config.pooled_dim))


@pytest.mark.parametrize("weights", ["dense", "bf16", "int8", "student"])
def test_transformer(target, modules, weights):
    """Its velocity and the gradient of that: ternary with either kind of activations, and as it learns; its linears are
    some 20, and attention two more a block."""
    transformer = modules["transformer"]
    if weights == "student":
        options = dataclasses.replace(Options(), products="float32")
        copy = jax.tree.map(lambda x: x, transformer)  # its layers are replaced in place
        transformer = student_of(copy, "", options)
    elif weights != "dense":
        transformer = quantize_transformer(transformer, activations=weights)

    def loss(*args):
        return jnp.square(velocity(transformer, *args)).sum()

    check(jax.value_and_grad(loss, (0, 1, 2)), *inputs(transformer.config), at_least=20)


def test_text_encoders(target, modules):
    ids = jnp.ones((1, 8), jnp.int32)
    check(modules["t5"], ids, at_least=9)  # 7 linears and attention, in a layer that is scanned
    check(modules["clip"], ids, at_least=8)


@pytest.mark.parametrize("strip_bytes", [None, 1 << 12])
def test_autoencoder(target, modules, strip_bytes):
    vae = modules["vae"]
    check(lambda x: vae.decode(x, strip_bytes), jnp.ones((1, 4, 4, 16)), at_least=30)
    check(vae.encode, jnp.ones((1, 32, 32, 3)), at_least=20)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_kernels(implementation):
    """The product and its gradient, and a product with an epilogue."""
    codes = np.random.default_rng(0).integers(-1, 2, (48, 128), np.int8)
    packed, scale = jnp.asarray(pack_ternary(codes)), jnp.ones(48)

    def plain(x):
        return ternary_matmul(x, packed, scale, implementation=implementation).sum()

    def finished(x):
        return fused.fused_matmul(x, None, packed, scale, None, fused.Gelu(), implementation=implementation)

    with compiling_for(GPU):
        for program in (plain, jax.grad(plain), finished):
            check(program, jnp.ones((8, 128)), at_least=1)


def test_nothing_else_is_given_a_precision(modules, monkeypatch):
    """bfloat16 is what it was; and on a GPU cuDNN computes its attention, which is not here to be traced."""
    by = []

    def fused_attention(q, k, v, *, implementation):
        by.append(implementation)
        return q + k + v

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused_attention)
    transformer = jax.tree.map(lambda x: x.astype(jnp.bfloat16), modules["transformer"])
    args = [x.astype(jnp.bfloat16) for x in inputs(transformer.config)]
    with compiling_for(GPU):
        jaxpr = jax.make_jaxpr(lambda *args: velocity(transformer, *args))(*args).jaxpr
    found = [e for e in equations(jaxpr) if e.primitive.name in PRODUCTS]
    assert len(found) >= 10
    assert {e.params["precision"] for e in found} == {None}
    assert set(by) == {"cudnn"}
