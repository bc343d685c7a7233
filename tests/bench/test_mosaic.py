"""Mosaic beside Triton: what is compared, and what is worth building."""

import statistics

import jax.numpy as jnp
import pytest

from bench import journal, mosaic, timing


def test_without_mosaics_interpreter_a_rehearsal_says_so(capsys, monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(mosaic, "lacking", lambda: "JAX has no interpreter")
    monkeypatch.setattr(
        timing, "run", lambda cases, rows, **_: [rows.row(**case.labels, failure="why") for case in cases]
    )
    mosaic.main(["--tiny", "--rows", str(path)])
    rows = journal.read(path)
    assert [row.get("implementation") for row in rows] == ["bf16", "triton", None]
    assert rows[-1]["skipped"] == "JAX has no interpreter" and rows[-1]["skipped"] in capsys.readouterr().out


def test_the_kernel_takes_whole_tiles():
    matmul = pytest.importorskip("bench.mosaic_matmul").matmul
    x, packed = jnp.zeros((128, 256), jnp.int8), jnp.zeros((128, 64), jnp.uint8)
    with pytest.raises(ValueError, match="128 x 128 x 256 are no multiples of 128 x 256 x 128"):
        matmul(x, packed)


def test_the_verdict_compares_the_best_of_each_that_is_right():
    def row(m, name, seconds, correct=True):
        return {"m": m, "n": 1, "k": 1, "implementation": name, "seconds": seconds, "correct": correct}

    rows = [row(1, "triton", 3.0), row(1, "triton", 2.0), row(1, "triton", 1.0, False), row(1, "mosaic", 1.0)]
    rows += [row(2, "triton", 1.0), row(2, "mosaic", 2.0), row(2, "mosaic", 1.0), row(2, "bf16", 0.1)]
    rows += [row(3, "mosaic", 1.0), {"m": 3, "n": 1, "k": 1, "implementation": "triton", "failure": "why"}]
    found = mosaic.verdict(rows)
    assert found["1x1x1"] == pytest.approx(100) and found["2x1x1"] == pytest.approx(0) and found["sizes"] == 2
    assert found["ahead_percent"] == pytest.approx(100 * (statistics.geometric_mean([2, 1]) - 1))
    assert found["worth_building"]
    assert "failure" in mosaic.verdict(rows[-2:])
