"""Whether a GPU is right: what is too far off, what moves from one run to the next, what nobody writes, is found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import correct, journal
from bench.journal import Journal
from flux_jax.config import dev, nano
from flux_jax.errors import UserError
from pallas_kernels import Target, compiling_for, fused, triton
from pallas_kernels.tiling import EPILOGUES


@pytest.fixture
def interpreted():
    with compiling_for(Target("interpret", "9.0")):
        yield


def test_a_verdict_names_what_is_beyond_its_limit():
    found = {"error": 0.1, "moved": 0, "seconds": 3}
    assert correct.verdict(found, {"error": 0.1}) == found
    assert correct.verdict(found, {"error": 0.05})["wrong"] == "error 0.1"
    assert correct.verdict({"error": float("nan"), "moved": 2}, {"error": 1})["wrong"] == "error nan, moved 2"


def test_what_moves_between_runs_is_counted():
    results = iter([jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 3)).at[0].set(1), jnp.zeros((2, 3))])
    first, moved = correct.runs(lambda: next(results), jnp.zeros((2, 3)))
    assert moved == 3 and not first.any()


def test_what_nobody_writes_is_infinitely_far():
    right = jnp.arange(6.0).reshape(2, 3)
    assert correct.distance(right.at[1, 1].set(jnp.nan), right)["error"] == np.inf
    assert correct.distance(right.at[1, 1].add(1), right) == pytest.approx(
        {"error": 0.2, "largest": 1, "differ": 1 / 6}
    )


def off_by_one(function):
    """The same with one element moved by one, and where there are several results that of the first."""

    @functools.wraps(function)
    def wrong(*operands, implementation="triton", **how):
        found = function(*operands, **how)
        leaves, tree = jax.tree.flatten(found)
        leaves[0] = leaves[0].at[0, 0].add(jnp.asarray(2, leaves[0].dtype))
        return tree.unflatten(leaves)

    return wrong


@pytest.mark.parametrize(
    ("module", "name", "job"),
    [
        (triton, "matmul", functools.partial(correct.integers, 7, 16, 128)),
        (triton, "matmul", functools.partial(correct.integers, 7, 16, 128, 3)),
        (triton, "matmul", functools.partial(correct.epilogue, "gelu", 7, 16, 128, 16)),
        (triton, "matmul", functools.partial(correct.residual_kept, 7, 16, 128)),
        (correct, "ternary_matmul", functools.partial(correct.floats, 7, 16, 128, "float32")),
    ],
)
def test_a_kernel_that_is_off_is_found(module, name, job, interpreted, monkeypatch):
    assert "wrong" not in job()
    monkeypatch.setattr(module, name, off_by_one(getattr(module, name)))
    assert job()["wrong"].startswith(("differ", "error"))


def test_rows_that_are_rounded_otherwise_are_found(interpreted):
    x = jax.random.normal(jax.random.key(0), (7, 96))

    def rounds(x, implementation):
        q, scale = fused.concatenate_quantize(x, implementation="xla")
        return (q.at[0, 0].add(jnp.int8(-3)), scale) if implementation == "triton" else (q, scale)

    assert "wrong" not in correct.rounding(fused.concatenate_quantize, x)
    assert correct.rounding(rounds, x)["wrong"] == "largest 3"


def test_cases_are_named_once_and_have_every_epilogue():
    for config, tiny in ((dev(), False), (nano(), True)):
        names = [name for name, _ in correct.cases(config, tiny)]
        assert len(set(names)) == len(names)
        assert all(any(name.startswith(epilogue) for name in names) for epilogue in EPILOGUES)
        for other in ("integers", "residual kept", "stack", "norm ", "concatenate", "bfloat16", "integers, layer"):
            assert any(name.startswith(other) for name in names), other


def test_a_case_that_fails_or_is_wrong_leaves_the_others(capsys, monkeypatch, tmp_path):
    def fails():
        raise RuntimeError("no tile fits")

    named = [("good", dict), ("fails", fails), ("wrong", lambda: {"wrong": "error 1"}), ("last", dict)]
    monkeypatch.setattr(correct, "cases", lambda *_: iter(named))
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="2 of 4 cases are wrong or failed") as error:
        correct.main(["--tiny", "--rows", str(path)])
    assert error.value.exit_code == 1
    rows = {row["case"]: row for row in journal.read(path)}
    assert set(rows) == {"good", "fails", "wrong", "last"} and rows["fails"]["failure"] == "RuntimeError: no tile fits"
    late = Journal(None, "correct", seconds=1)
    correct.check(late, iter(named), tiny=True)
    assert all("skipped" in row for row in late.rows)
