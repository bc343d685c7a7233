"""The ternary transformer against the dense one whose linears hold codes * scale, and one layer against numpy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from flux_jax.models.attention import rope_cos_sin
from flux_jax.models.layers import Linear
from flux_jax.models.params import abstract_component, assemble, dotted, leaf_table, leaves
from flux_jax.models.quantize import abstract_ternary, is_ternary, quantize_transformer, replace_linears, ternarize
from flux_jax.models.ternary import PackedTernary, TernaryLinear
from flux_jax.sampling.programs import Conditions, denoise
from flux_jax.sampling.schedule import position_ids
from pallas_kernels import Target, compiling_for, packed_width

PICTURES = 5
ROUNDING = 1e-5  # of float32, relative to the largest value: the same sums in another order
INT8 = 0.03  # relative RMS error of the velocity: each activation rounded by up to 1/254 of its row's largest


@pytest.fixture(scope="module")
def dense():
    """Two double blocks, so that every kind of block is stacked; biases that are not zero."""
    transformer = dataclasses.replace(tiny_model.config().transformer, num_double_blocks=2)
    return tiny_model.modules(dataclasses.replace(tiny_model.config(), transformer=transformer))["transformer"]


@jax.jit
def rounded(transformer):
    """The same transformer with dense linears that hold codes * scale."""

    def change(_, linear):
        codes, scale = ternarize(linear.weight[...])
        copy = nnx.merge(*nnx.split(linear))
        copy.weight = nnx.Param(codes.astype(jnp.float32) * scale[..., None])
        return copy

    return replace_linears(transformer, change)


def velocity(transformer, key):
    """Of random tokens of several pictures: 2 x 3 image tokens, 5 of text."""
    config = transformer.config
    img, txt, pooled = (
        jax.random.normal(jax.random.fold_in(key, i), (PICTURES, *shape))
        for i, shape in enumerate([(6, config.in_channels), (5, config.text_dim), (config.pooled_dim,)])
    )
    modulation = transformer.modulation(jnp.full(PICTURES, 0.7), jnp.full(PICTURES, 3.5), pooled)
    rope = rope_cos_sin(position_ids(2, 3, 5), config.axes_dim, config.theta)
    return transformer(img, txt, modulation, jnp.asarray(rope))


def run(transformer):
    return np.asarray(jax.jit(lambda *args: velocity(*args))(transformer, jax.random.key(5)))  # nothing traced before


def kernels(transformer):
    """The names of Triton's kernels in the program."""
    program = str(jax.make_jaxpr(lambda *args: velocity(*args))(transformer, jax.random.key(5)))
    return set(re.findall(r"\bname=(matmul|norm_modulate_quantize)\b", program))


def relative_rms(actual, expected):
    return np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean())


def test_velocity_is_that_of_the_dequantized_weights(dense):
    expected = run(rounded(dense))
    exact = run(tiny_model.quantized(dense))
    assert np.abs(exact - expected).max() <= ROUNDING * np.abs(expected).max()
    int8 = run(tiny_model.quantized(dense, activations="int8"))
    assert 1e-4 < relative_rms(int8, expected) < INT8


@pytest.mark.slow
def test_triton_gives_the_velocity_of_xla(dense):
    """Layers that are told to take XLA take it for the norms in front of them, too.

    An activation within float32's rounding of halfway between two int8 steps goes to either. That is so in 4 of 200
    pictures like these (the other 196 agree to 3e-7), and costs less than all the roundings to int8 together.
    """
    model = tiny_model.quantized(dense, activations="int8")
    expected, exact = run(model), run(tiny_model.quantized(dense))
    with compiling_for(Target("interpret", "9.0")):
        assert kernels(model) == {"norm_modulate_quantize", "matmul"}
        found = run(model)
        apart = np.abs(found - expected).max((1, 2)) / np.abs(expected).max((1, 2))
        assert np.median(apart) <= ROUNDING
        assert relative_rms(found, expected) < relative_rms(exact, expected)
        for _, layer in nnx.iter_modules(model):
            if isinstance(layer, TernaryLinear):
                layer.implementation = "xla"
        assert not kernels(model)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_layer_with_int8_activations_is_numpys(dtype):
    rng = np.random.default_rng(3)
    codes, scale = rng.integers(-1, 2, (7, 130), dtype=np.int8), rng.uniform(0.01, 0.1, 7).astype(np.float32)
    bias, x = rng.standard_normal(7).astype(dtype), rng.standard_normal((2, 3, 130)).astype(dtype)
    layer = TernaryLinear.from_codes(jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(bias), activations="int8")
    exact = x.astype(np.float64)
    step = np.abs(exact).max(-1, keepdims=True) / 127
    expected = np.rint(exact / step) @ codes.T.astype(np.float64) * step * scale + bias.astype(np.float64)
    actual = jax.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x))
    assert actual.dtype == dtype
    assert (
        np.abs(np.asarray(actual, np.float64) - expected).max()
        <= (1e-6 if dtype == jnp.float32 else 2**-8) * np.abs(expected).max()
    )


def test_the_loop_over_steps_reads_no_modulation_weights(dense):
    """XLA carries through a loop what its body reads: every other ternary layer, whole, not a layer at a time."""
    config = dataclasses.replace(tiny_model.config(), transformer=dense.config)
    transformer, width = abstract_ternary(config), dense.config.hidden_size
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    text, pooled = array(1, 4, dense.config.text_dim), array(1, dense.config.pooled_dim)
    conditions = Conditions(text, pooled, array(), array(), array(2, 10, dense.config.head_dim // 2))
    program = denoise.lower(transformer, array(6, dense.config.in_channels), array(4), conditions).compile().as_text()
    (loop,) = re.findall(r"= \((.*?)\) while\(.*op_name=\"jit\(denoise\)/denoise/while\"", program)
    carried = set(re.findall(r"u8\[([\d,]+)\]", loop))
    layers, kp = dense.config.num_double_blocks, packed_width(width)
    assert f"{layers},{3 * width},{kp}" in carried  # qkv
    assert f"{layers},{6 * width},{kp}" not in carried  # mod
    stacked = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(transformer) if leaf.dtype == jnp.uint8}
    assert carried < stacked


def test_abstract_and_concrete_forms_agree(dense):
    config = dataclasses.replace(tiny_model.config(), transformer=dense.config)
    abstract, concrete = abstract_ternary(config, activations="int8"), tiny_model.quantized(dense, activations="int8")
    assert nnx.graphdef(abstract) == nnx.graphdef(concrete)
    kinds = [(v.shape, v.get_value().dtype) for _, v in nnx.to_flat_state(nnx.state(abstract))]
    assert kinds == [(v.shape, v.get_value().dtype) for _, v in nnx.to_flat_state(nnx.state(concrete))]
    filled = assemble(abstract, lambda names: {n: v for n, v in leaves(concrete) if n in names}, dtype=jnp.bfloat16)
    for path, variable in nnx.to_flat_state(nnx.state(filled)):
        own = {"packed": jnp.uint8, "scale": jnp.float32}.get(path[-1], jnp.bfloat16)
        assert variable.get_value().dtype == own, dotted(path)
        assert isinstance(variable, PackedTernary) == (path[-1] == "packed")


def test_the_rule_names_every_linear_of_the_blocks_and_no_other(dense):
    modules = {dotted(path): module for path, module in nnx.iter_modules(dense)}
    linears = {path for path, module in modules.items() if isinstance(module, Linear)}
    blocks = {path for path in linears if path.startswith(("double_blocks.", "single_blocks."))}
    assert {path for path in modules if is_ternary(path)} == blocks
    assert linears - blocks == {path for path in linears if path.split(".")[0] in dense_parts()}
    assert is_ternary("double_blocks.18.txt.mlp_out") and is_ternary("single_blocks.37.linear1")
    assert not any(map(is_ternary, ("double_blocks", "double_blocks.img", "single_blocks.3.query_norm", "img_in.mod")))


def dense_parts():
    return {"time_in", "vector_in", "guidance_in", "img_in", "txt_in", "final_layer"}


def test_quantizing_leaves_the_given_transformer_alone(dense):
    table = leaf_table(dense)
    quantize_transformer(dense, "absmean")  # not in one program, in which nothing could be changed
    assert leaf_table(dense) == table == leaf_table(abstract_component("transformer", dataclasses.replace(
        tiny_model.config(), transformer=dense.config
    )))  # fmt: skip


def test_activations_that_are_not_there(dense, snapshot_message):
    with snapshot_message.raises(ValueError, "fp4"):
        quantize_transformer(dense, activations="fp4")
