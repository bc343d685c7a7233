"""The least that a step in bf16 takes: every part as often as a step runs it, and attention by whatever works."""

import json

import pytest

from bench import baseline, timing
from bench.journal import Journal
from flux_jax.config import nano
from pallas_kernels import Target, compiling_for


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_baseline_sums_each_part_as_often_as_a_step_runs_it(capsys, monkeypatch):
    """With a timer by which a call takes a second for each of its multiplications, and attention half a second."""

    def samples(case, program, **_):
        labels = case.labels
        seconds = labels["m"] * labels["n"] * labels["k"] if "k" in labels else 0.5
        return {"seconds": float(seconds), "quartiles": [0.0, 0.0], "tflops": 1.0}

    monkeypatch.setattr(timing, "compile_all", lambda cases, *_, **__: [timing.Future() for _ in cases])
    monkeypatch.setattr(timing.Future, "result", lambda _: None)
    monkeypatch.setattr(timing, "measure", samples)
    baseline.main(["--tiny"])
    total = last_line(capsys)["figures"]["total"]
    config, image, text, d = nano(), 64, 16, 128
    single = config.transformer.num_single_blocks * (image + text) * (7 + 5) * d * d
    double = config.transformer.num_double_blocks * (image + text) * (3 + 1 + 4 + 4) * d * d
    attention = 0.5 * (config.transformer.num_single_blocks + config.transformer.num_double_blocks)
    assert total["step_ms"] == pytest.approx(1e3 * (single + double + attention))
    assert sum(total["part_ms"].values()) == pytest.approx(total["step_ms"])
    assert "attention" in total["in_it"] and "copies of weights" in total["not_in_it"]


def test_a_part_without_a_time_leaves_no_sum_unless_it_was_tried_again():
    parts = [{"part": "a", "calls": 2, "seconds": 1.0}, {"part": "attention", "calls": 3, "failure": "cuDNN"}]
    assert baseline.total(parts) == {"failure": "no sum without attention"}
    found = baseline.total([*parts, {"part": "attention", "calls": 3, "seconds": 2.0}])
    assert found["step_ms"] == 8000 and found["part_ms"] == {"a": 2000, "attention": 6000}


def test_attention_is_tried_again_by_xla_where_cudnn_fails(monkeypatch):
    """This device has none of cuDNN's kernels, whatever it is said to be."""
    with compiling_for(Target("gpu", "9.0", "an H100")):
        rows = baseline.attention(nano(), Journal(None, "test"), tiny=True)
    assert [row["implementation"] for row in rows] == ["cudnn", "xla"]
    assert "failure" in rows[0] and rows[1]["seconds"] > 0
