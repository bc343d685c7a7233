"""Products with what they end with, and what stands before them: all of a step's, and what is wrong is found."""

import functools

import jax.numpy as jnp
import pytest

from bench import fused, implementations, products, timing
from bench.journal import Journal
from flux_jax.config import dev, nano


def test_fused_has_every_epilogue_by_kernel_and_by_xla():
    names = {product.epilogue for product in products.model_products(dev())}
    for config, tiny in ((dev(), False), (nano(), True)):
        found = [case.labels for case in fused.cases(config, tiny)]
        ends = {(labels["epilogue"], labels["implementation"]) for labels in found if "epilogue" in labels}
        assert ends == {(name, implementation) for name in names for implementation in fused.IMPLEMENTATIONS}
        roundings = {labels["kernel"] for labels in found if "kernel" in labels}
        assert roundings == {"norm_modulate_quantize", "concatenate_quantize"}


def test_fused_covers_a_step_of_flux():
    found = [case.labels for case in fused.cases(dev(), tiny=False)]
    assert {labels["m"] for labels in found} == {4608, 4096, 512}
    assert {(labels["k"], labels["parts"]) for labels in found if labels.get("kernel") == "concatenate_quantize"} == {
        (15360, 2),
        (3072, 1),
        (12288, 1),
    }


@pytest.mark.parametrize("name", ["none", "gated_residual", "gelu", "norm_rotary"])
def test_a_wrong_epilogue_is_found(name):
    """One of a head's channels is not turned, or a tenth of what is to be added is missing: the row is not correct."""
    product = products.Product(40, 128, 256, name, 1, ())

    def multiply(share, x, own, epilogue):
        y = implementations.fused.fused_matmul(*x, **own, epilogue=epilogue, implementation="xla")
        return y.at[:, 3].multiply(jnp.bfloat16(share))

    for share, right in ((1, True), (0.9, False)):
        case = implementations.fused_case(product, 32, {}, functools.partial(multiply, share))
        (row,) = timing.run([case], Journal(None, "test"), tiny=True)
        assert row["correct"] is right, row


def test_a_residual_is_followed_through_many_calls(monkeypatch):
    """As on a GPU: several copies, rounds and launches, each of which adds to what is there."""
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-6)
    product, seen = products.Product(40, 128, 256, "gated_residual", 1, ()), []

    def multiply(x, own, epilogue):
        return implementations.fused.fused_matmul(*x, **own, epilogue=epilogue, implementation="xla")

    case = implementations.fused_case(product, 32, {}, multiply)._replace(copies=2)
    figures = case.figures
    case = case._replace(figures=lambda ran: seen.append(ran) or figures(ran))
    (row,) = timing.run([case], Journal(None, "test"), tiny=False, samples=2)
    assert row["correct"] and len(row["samples_us"]) == 2
    assert seen[0].calls == timing.ROUNDS and float(jnp.abs(seen[0].out).max()) > 10
    assert not figures(seen[0]._replace(calls=timing.ROUNDS - 1))["correct"]
