"""`python -m bench.kernels` at sizes that say nothing of speed: every result is a row, and what is wrong is found."""

import json
import sys

import pytest

from bench import journal, kernels, products, report
from bench.implementations import IMPLEMENTATIONS
from bench.journal import Journal
from flux_jax.config import dev, nano
from flux_jax.errors import UserError

WORDS = ["--tiny", "--shapes", "128x128", "--m", "5"]


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_users_mistake_is_one_sentence_and_a_status(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.kernels", "--tiny", "--shapes", "128x128", "7x7"])
    assert report.run(kernels.main) == 2
    known = ", ".join(f"{n}x{k}" for n, k in products.shapes(nano()))
    assert capsys.readouterr().err == f"--shapes must name some of {known}, not 7x7.\n"


def test_every_result_is_a_row_and_each_number_of_tokens_ends_with_means(capsys, tmp_path):
    path, names = tmp_path / "rows.jsonl", ["bf16", "A16 scratch"]
    words = ["--tiny", "--shapes", "128x128", "--m", "5", "3", "--implementations", *names]
    kernels.main([*words, "--rows", str(path), "--label", "one"])
    figures = last_line(capsys)["figures"]
    assert [(row["m"], row["implementation"]) for row in figures["products"]] == [(m, n) for m in (5, 3) for n in names]
    assert figures["wrong"] == 0
    assert all(row["seconds"] > 0 and row["error"] > 0 and row["share_of_peak"] for row in figures["products"])
    rows = journal.read(path)
    assert {row["step"] for row in rows} == {"one"}
    kinds = [next(key for key in ("ceiling", "over_bf16", "implementation") if key in row) for row in rows]
    products, means = ["implementation"] * 2, ["over_bf16"] * 2
    assert kinds == [*products, *["ceiling"] * 3, *means, *products, *means]
    assert [row["ceiling"] for row in figures["best"]] == ["copy", "bf16", "int8"]


def test_one_that_fails_and_one_that_is_wrong_leave_the_others(capsys, tmp_path, monkeypatch):
    path, known = tmp_path / "rows.jsonl", IMPLEMENTATIONS["A8 scratch"]

    def fails(x, weights):
        raise RuntimeError("out of registers")

    monkeypatch.setitem(IMPLEMENTATIONS, "A8 kernel", known._replace(function=fails))
    monkeypatch.setitem(IMPLEMENTATIONS, "A16 scratch", known._replace(function=lambda x, w: 2 * known.function(x, w)))
    names = ["A8 kernel", "A16 scratch", "bf16"]
    with pytest.raises(UserError, match="1 results were wrong") as caught:
        kernels.main([*WORDS, "--implementations", *names, "--rows", str(path)])
    assert caught.value.exit_code == 1
    failed, wrong, good = journal.read(path)[:3]
    assert failed["failure"] == "RuntimeError: out of registers" and "seconds" not in failed
    assert not wrong["correct"] and good["correct"]
    out = capsys.readouterr().out
    assert "out of registers" in out and json.loads(out.splitlines()[-1])["figures"]["wrong"] == 1


def test_when_the_time_is_over_the_rest_is_skipped(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    kernels.main([*WORDS, "--seconds", "0", "--rows", str(path)])
    assert {row.get("skipped") for row in journal.read(path)} == {"0 s left"}
    assert last_line(capsys)["figures"]["summary"] == []


def test_by_default_the_layers_of_so_many_tokens_by_what_suits_them():
    plan = kernels.groups(kernels.options([]))
    shapes = {m: list(dict.fromkeys((n, k) for n, k, _ in products)) for m, products in plan}
    assert [m for m, _ in plan] == [4608, 1, 512, 28]
    every = sorted(products.shapes(dev()), key=lambda s: -s[0] * s[1])
    assert shapes[1] == every
    assert shapes[4608] == [shape for shape in every if shape != (18432, 3072)]
    text = {(12288, 3072), (3072, 12288), (9216, 3072), (3072, 3072)}
    assert shapes[512] == [shape for shape in every if shape in text]
    assert shapes[28] == [(18432, 3072), (9216, 3072)]
    for m, found in plan:
        names = kernels.MANY if m == 4608 else kernels.FEW
        every = [(*shape, name) for shape in shapes[m] for name in names]
        assert found == [*every, *[kernels.MANY_TOO] * (m == 4608)]
    tiny = kernels.groups(kernels.options(["--tiny"]))
    assert [tuple(name for *_, name in found) for _, found in tiny] == [kernels.MANY, kernels.FEW]


def test_the_summary_is_the_geometric_mean_and_the_least():
    def row(k, name, seconds):
        return {"m": 1, "n": 8, "k": k, "implementation": name, "seconds": seconds, "tflops": 1.0}

    rows = [row(1, "bf16", 4.0), row(1, "A8 kernel", 1.0), row(2, "bf16", 3.0), row(2, "A8 kernel", 3.0)]
    rows += [row(3, "A8 kernel", 9.0), {"m": 1, "n": 8, "k": 4, "implementation": "bf16", "failure": "why"}]
    written = Journal(None, "test")
    *_, found = kernels.summarise([{"ceiling": "copy", "bytes": 4.0}, *rows], written)
    assert found == {"m": 1, "over_bf16": "A8 kernel", "shapes": 2, "geometric_mean": 2.0, "least": 1.0}
    assert written.rows[-1] == found
    assert rows[1]["share_of_peak"] == pytest.approx(8 * 1 * 2 / 8 / 1.0 / 4.0)  # of the bytes, with one token
    assert rows[4]["speedup"] is None
