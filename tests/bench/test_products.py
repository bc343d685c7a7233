"""The products that are measured are the model's, and what is right is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import implementations, memory, products, synthetic
from flux_jax.config import dev, nano
from flux_jax.models import ternary
from flux_jax.models.quantize import ternary_paths
from flux_jax.sampling.programs import denoise
from pallas_kernels import Target, compiling_for, epilogues, fused, unpack_ternary
from pallas_kernels.tiling import EPILOGUES


def test_shapes_are_those_of_every_ternary_layer():
    found = products.shapes(dev())
    assert set(found) == set(ternary_paths(dev()).values())
    assert {n * k for n, k in found} >= {21504 * 3072, 3072 * 15360}
    assert "single_blocks.linear1" in found[21504, 3072]


@pytest.mark.parametrize("config", [dev(), nano()], ids=lambda config: config.name)
def test_layers_are_those_shapes(config):
    found = {}
    for layer in [*products.layers(config), *products.modulations(config, 28)]:
        found.setdefault((layer.n, layer.k), []).append(layer.name)
    assert {key: sorted(names) for key, names in found.items()} == {
        key: sorted(names) for key, names in products.shapes(config).items()
    }


def test_products_are_those_that_the_model_runs(monkeypatch):
    """Recorded while a step of FLUX-nano is traced, whose blocks are traced once for each kind."""
    run = set()

    def record(rows, row_scale, packed, scale, bias, epilogue, *, channels=None, **how):
        n = packed.shape[-2] if channels is None else channels[1] - channels[0]
        run.add((rows.shape[0], n, rows.shape[1], epilogues.epilogue_name(epilogue)))
        return fused.fused_matmul(rows, row_scale, packed, scale, bias, epilogue, channels=channels, **how)

    monkeypatch.setattr(ternary, "fused_matmul", record)
    transformer = memory.abstract_transformer(nano(), "ternary A8")
    noise, *rest = synthetic.inputs(nano(), 1, *nano().default_grid, jnp.bfloat16)
    jax.eval_shape(denoise.__wrapped__, transformer, noise, *rest)
    assert run == {product[:4] for product in products.model_products(nano())}


def test_a_step_runs_all_products_of_its_blocks():
    """From the parameters: 19 double blocks with two streams, 38 single ones; queries and keys end alike."""
    found = products.model_products(dev(), [28])
    step = [product for product in found if product.calls]
    assert found[0][:4] == (4608, 3072, 15360, "gated_residual") and found[0].calls == 38
    assert {product.m for product in step} == {4608, 4096, 512}
    d, weights = 3072, sum(product.calls * product.n * product.k for product in step)
    assert weights == (19 * 2 * 12 + 38 * 12) * d * d
    (turned,) = (p for p in step if (p.m, p.epilogue) == (4608, "norm_rotary"))
    assert turned.calls == 2 * 38
    assert {p[:3] for p in found if not p.calls} == {(28, 6 * d, d), (28, 3 * d, d)}


@pytest.mark.parametrize(("name", "kind"), [("none", "bf16"), *((name, "int8") for name in EPILOGUES)])
def test_what_is_right_is_so_in_float64(name, kind):
    m, n, k, head = 70, 64, 256, 32
    x, own = products.tokens(m, k), products.weights("packed", n, k)
    epilogue = products.epilogue_operands(name, m, n, head)
    assert epilogues.epilogue_name(epilogue) == name
    rows, row_scale = (np.asarray(part, np.float64) for part in products.rounded(kind, x))
    scale, bias = (np.asarray(own[key], np.float64) for key in ("scale", "bias"))
    y = rows @ unpack_ternary(np.asarray(own["packed"]), k).T.astype(np.float64) * row_scale[:, None] * scale + bias
    right = np.asarray(epilogues.finish(jnp.asarray(y, jnp.float32), epilogue), np.float64)
    found = products.expected(kind, x, own, epilogue)
    kept = products.checked_rows(m)
    assert len(kept) == products.CHECKED_ROWS and kept[0] == 0 and kept[-1] == m - 1
    wrong = np.abs(np.asarray(found, np.float64) - right[kept]).max() / np.abs(right).max()
    assert wrong < (0.01 if name == "gelu_quantize" else 1e-5)  # a number between two may be rounded to either
    assert products.error(jnp.asarray(right, jnp.float32), found) == pytest.approx(wrong, abs=1e-6)


@pytest.mark.parametrize("name", ["bf16", "A16 scratch", "A8 scratch", "fp8 scratch"])
def test_a_wrong_product_is_found(name):
    """One sign of one weight, of one channel, in 128 x 256."""
    kind, activations, function = implementations.IMPLEMENTATIONS[name]
    x, own = products.tokens(40, 256), products.weights(kind, 128, 256)
    right, limit = products.expected(activations, x, own), products.LIMITS[activations]
    assert products.judged(function(x, own), right, limit)["correct"]
    largest = int(jnp.abs(x[0]).argmax())
    if kind == "dense":
        changed = own | {"weight": own["weight"].at[0, largest].add(1)}
    else:  # both bits of that code turned round: it moves by one or two
        byte, plane = largest % 128 % 32 + 32 * (largest // 128), largest % 128 // 32
        changed = own | {"packed": own["packed"].at[0, byte].set(own["packed"][0, byte] ^ jnp.uint8(3 << 2 * plane))}
        assert (unpack_ternary(changed["packed"], 256) != unpack_ternary(own["packed"], 256)).sum() == 1
    y = function(x, changed)
    assert products.error(y, right) > limit and not products.judged(y, right, limit)["correct"]
    assert products.error(y.at[0, 0].set(jnp.nan), right) == np.inf


def test_fp8_is_refused_where_there_is_none():
    with compiling_for(Target("gpu", "8.0", "NVIDIA A100")), pytest.raises(ValueError, match="A100 has no fp8"):
        implementations.fp8_scratch(products.tokens(3, 128), products.weights("packed", 16, 128))
