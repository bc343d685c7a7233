"""Pictures by each kind of weights: a row for each trial when it is known, whatever becomes of it."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import denoise, journal, memory, report, synthetic
from bench.journal import Journal
from bench.process import Ended
from flux_jax.errors import UserError
from flux_jax.models import attention
from pallas_kernels import Target, compiling_for, validate

PICTURE = {"steps": 2, "seconds": [4.0, 2.0, 3.0], "joules": 700.0, "finite": True}
FOUND = {"compile_seconds": 1.0, "peak_bytes": 24_000_000_000, "copied_bytes": 17_213_423_616, "pictures": [PICTURE]}


def test_synthetic_weights_are_valid_and_no_two_layers_alike():
    packed, weights, again = (
        np.asarray(synthetic._stack(kind, 3, (64, 32), jnp.dtype(dtype), 0.1, seed))
        for kind, dtype, seed in (("packed", "uint8", 0), ("weight", "float32", 0), ("weight", "float32", 1000))
    )
    validate(packed, 128)
    assert weights.std() == pytest.approx(0.1, rel=0.05)
    for stack in (packed, weights, np.concatenate([weights[:1], again])):
        assert all((stack[0] != other).mean() > 0.9 for other in stack[1:])


def test_each_trial_is_a_row_and_a_line_whatever_became_of_it(capsys, monkeypatch, tmp_path):
    answers = {
        "bf16": Ended(0, 9.0, [json.dumps(FOUND)], []),
        "ternary A16": Ended(None, 5.0, [], []),
        "ternary A8": Ended(-9, 5.0, [], []),
        "diffusers bf16": Ended(0, 1.0, [json.dumps({"failure": "torch is not installed"})], []),
    }
    boxes = []

    def run(words, *, seconds):
        boxes.append(seconds)
        return answers[words[words.index("--trial") + 1]]

    monkeypatch.setattr(denoise.process, "run", run)
    monkeypatch.setattr(denoise, "report", types.SimpleNamespace(**vars(report) | {"finish": lambda *_, **__: None}))
    monkeypatch.setattr(denoise.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(denoise, "chart", lambda path, title, found: path.write_text(title))
    words = ["--trials", *answers, "--steps", "2", "--save", str(tmp_path / "denoise.json")]
    denoise.main([*words, "--rows", str(tmp_path / "rows.jsonl"), "--trial-seconds", "70", "--seconds", "50"])
    assert len(boxes) == 4 and all(0 < box <= 50 for box in boxes)  # what is left, if that is less
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("bf16") and lines[-4].split()[1:6] == ["2", "3", "1,500", "24", "700"]
    assert lines[-4].endswith("copies 17.2 GB of weights a step: see bench.baseline")
    failures = ["killed at its time box, after 5 s", "killed by SIGKILL", "torch is not installed"]
    assert all(line.endswith(failure) for line, failure in zip(lines[-3:], failures, strict=True))
    rows = journal.read(tmp_path / "rows.jsonl")
    assert [row.get("failure") for row in rows] == [None, None, *failures]
    assert rows[0]["copied_bytes"] == FOUND["copied_bytes"] and rows[1]["ms_a_step"] == 1500.0
    assert (rows[1]["least_ms"], rows[1]["joules_a_step"], rows[1]["wrong"]) == (1000.0, 350.0, None)
    assert (tmp_path / "denoise.png").exists()


def test_a_trial_writes_its_own_rows(capsys, monkeypatch, tmp_path):
    wrong = {**FOUND, "pictures": [{**PICTURE, "finite": False}]}
    monkeypatch.setattr(denoise, "trial", lambda *_: wrong)
    path = tmp_path / "rows.jsonl"
    denoise.main(["--tiny", "--trial", "bf16", "--rows", str(path), "--label", "one"])
    assert json.loads(capsys.readouterr().out) == wrong
    assert [(row["step"], row.get("wrong")) for row in journal.read(path)] == [("one", None), ("one", "not finite")]


def test_what_is_not_installed_is_said(capsys, monkeypatch, tmp_path):
    def trial(*_):
        raise UserError("torch is not installed")

    monkeypatch.setattr(denoise.reference, "trial", trial)
    path = tmp_path / "rows.jsonl"
    denoise.main(["--tiny", "--trial", "diffusers bf16", "--rows", str(path)])
    assert json.loads(capsys.readouterr().out) == {"failure": "torch is not installed"}
    assert journal.read(path)[0]["skipped"] == "torch is not installed"


def test_where_cudnn_fails_xla_attends_and_a_row_says_so(monkeypatch):
    def trial(*_):
        if attention.current_target().platform == "gpu":
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED: no engine\nand more")
        return dict(FOUND)

    monkeypatch.setattr(denoise, "trial", trial)
    rows = Journal(None, "denoise")
    with compiling_for(Target("gpu", "9.0")):
        found = denoise.trial_with_any_attention(rows, "bf16", None, [2], 1)
    assert found == FOUND | {"attention": "XLA's attention"}
    assert [row["failure"] for row in rows.rows] == ["RuntimeError: CUDNN_STATUS_NOT_SUPPORTED: no engine"]
    assert denoise.notes(found).startswith("XLA's attention; copies")


def test_another_failure_is_no_reason_to_try_again(monkeypatch):
    def trial(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(denoise, "trial", trial)
    with pytest.raises(RuntimeError, match="EXHAUSTED"):
        denoise.trial_with_any_attention(Journal(None, "denoise"), "bf16", None, [2], 1)


def test_attention_by_xla_has_no_cudnn_in_it(monkeypatch):
    asked = []

    def record(q, k, v, implementation):
        asked.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with compiling_for(Target("gpu", "9.0")):
        attention.attention(q, q, q)
        assert asked == ["cudnn"]
        with denoise.attention_by_xla():
            np.testing.assert_array_equal(attention.attention(q, q, q), np.ones((1, 4, 16)))
    assert asked == ["cudnn"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_denoise_without_a_gpu_tells_the_compiled_memory_and_no_time(capsys, monkeypatch):
    monkeypatch.setenv(denoise.aot.SKIP_CHECK, "1")  # which the command sets: it must not outlast the test
    sizes = dict(zip(memory.WEIGHTS, (24.3e9, 3.53e9, 3.46e9), strict=True))
    monkeypatch.setattr(memory, "measure", lambda gpu, name, *_: {"total_bytes": sizes[name] if gpu == "a10" else 0})
    denoise.main(["--gpu", "a10"])
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split()[-6:] for line in table[-3:]] == [
        ["-", size, "-", "compiled,", "not", "run"] for size in ("24.3", "3.53", "3.46")
    ]
    found = json.loads(last)
    assert found["device"] == "none: compiled ahead of time for a10"
    assert found["figures"]["trials"]["bf16"] == {"peak_bytes": 24.3e9, "pictures": []}


def test_chart_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = {"peak_bytes": 10**9, "pictures": [{"steps": 2, "seconds": [4.0, 2.0, 3.0]}]}
    denoise.chart(tmp_path / "a.png", "title", {"bf16": found, "diffusers bf16": {"failure": "no"}})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
