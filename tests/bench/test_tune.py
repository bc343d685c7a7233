"""The tuner: what it finds is what the kernels read; its programs are few; one that fails is not chosen."""

import dataclasses
import json
import math

import pytest

from bench import implementations, journal, tiles, tune
from bench.journal import Journal
from bench.products import Product, model_products
from flux_jax.config import dev
from flux_jax.errors import UserError
from pallas_kernels import LAYOUT_VERSION, Target, compiling_for, tiling
from pallas_kernels.tiling import TileConfig, choose_tiles, read_table

H100 = Target("gpu", "9.0", "NVIDIA H100 80GB HBM3")
HEAD = dev().transformer.head_dim


def plan(operand):
    """Products of FLUX.1-dev with all settings that would be tried on an H100, the one in use first."""
    with compiling_for(H100):
        return {
            product: [tiles.own_settings(product, operand, HEAD), *tiles.candidates(product, operand, HEAD)]
            for product in tiles.wanted(dev(), operand)
        }


def test_every_product_of_the_model_is_tuned_by_few_programs():
    found = plan("int8")
    assert sum(map(len, found.values())) <= 120
    for product in model_products(dev(), tiles.STEPS):
        near = [p for p in found if p[1:4] == product[1:4] and max(p.m, product.m) <= 2 * min(p.m, product.m)]
        assert len(near) == 1, "one row of the table serves it"
    work = [product.calls * product.m * product.n * product.k for product in found]
    assert work == sorted(work, reverse=True)
    with compiling_for(H100):
        head = next(p for p in found if p.epilogue == "none" and p.m == 4608)
        assert len(tiles.candidates(head, "int8", HEAD, everything=True)) > 2 * len(found[head])


def test_tiles_with_reasons_are_tried_with_every_epilogue():
    for product, tries in plan("int8").items():
        assert len(set(tries)) == len(tries) >= 4
        assert all(4 * product.k // 4 % settings.block_k == 0 for settings in tries)
        if product.epilogue == "norm_rotary":
            assert {settings.block_n for settings in tries} == {HEAD}
        elif product.m > 512:
            assert {TileConfig(64, 256, 256, 4, 3), TileConfig(128, 256, 512, 8, 2)} <= set(tries)
        else:
            assert all(settings.block_m <= max(64, product.m) for settings in tries)


def test_floating_activations_meet_the_kernel_with_few_tokens_and_no_epilogue():
    found = plan("bfloat16")
    assert found and all(product.m <= 512 and product.epilogue == "none" for product in found)


def test_tuning_writes_a_table_that_the_kernels_read(capsys, tmp_path, monkeypatch):
    table, rows, epilogue = tmp_path / "test.json", tmp_path / "rows.jsonl", "gated_residual"
    product = Product(20, 128, 128, epilogue, 1, ("layer",))
    other = TileConfig(32, 32, 128, 2, 1)
    monkeypatch.setattr(tune, "wanted", lambda *_: [product])
    monkeypatch.setattr(tune, "candidates", lambda *_: [other])
    words = ["--tiny", "--table", str(table), "--rows", str(rows), "--m", "20"]
    tune.main(words)
    (row,) = read_table(table)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["rows"][0]["settings"] == row["settings"] and row["epilogue"] == epilogue
    assert len(row["trials"]) == 2 and all(trial["samples_us"] for trial in row["trials"])
    assert row["settings"] in [vars(other), dict(zip(vars(other), row["settings_before"], strict=True))]
    *trials, best = journal.read(rows)
    assert best["settings"] == row["settings"] and best["seconds"] == row["seconds"]
    assert [trial["tile"] for trial in trials] == [tiles.tile(trial["settings"]) for trial in row["trials"]]
    before = table.read_text()
    tune.main(words)  # what is in the table already is not tried again
    assert table.read_text() == before and len(journal.read(rows)) == 3

    monkeypatch.setattr(tiling, "table_path", lambda _: table)
    table.write_text(json.dumps({"layout": LAYOUT_VERSION, "rows": [{**row, "settings": vars(other)}]}))
    read_table.cache_clear()
    assert choose_tiles(H100, 20, 128, 128, "int8", epilogue) == other
    assert choose_tiles(H100, 20, 128, 128, "int8") != other, "without the epilogue it is another product"
    read_table.cache_clear()


def test_settings_that_fail_or_are_wrong_are_not_chosen(tmp_path, monkeypatch):
    good, bad, wrong = TileConfig(32, 64, 128, 4, 2), TileConfig(32, 64, 128, 8, 2), TileConfig(32, 64, 128, 2, 2)
    product = Product(40, 128, 128, "gated_residual", 1, ("layer",))

    def kernel(x, weights, epilogue, settings):
        if settings == bad:
            raise RuntimeError("too much shared memory\nand more")
        y = tune_twin(x, weights, epilogue)
        return y * 2 if settings == wrong else y

    def tune_twin(x, weights, epilogue):
        return implementations.fused.fused_matmul(*x, **weights, epilogue=epilogue, implementation="xla")

    monkeypatch.setattr(tune, "kernel", kernel)
    monkeypatch.setattr(tune, "own_settings", lambda *_: bad)
    path = tmp_path / "rows.jsonl"
    row = tune.tune(product, "int8", [good, wrong], 32, Journal(path, "tune"), tiny=True)
    assert row["settings"] == vars(good) and row["seconds_before"] is None
    assert row["settings_before"] == dataclasses.astuple(bad)
    assert [trial.get("failure", "")[:12] for trial in row["trials"]] == ["RuntimeError", "", "wrong: error"]
    assert len(journal.read(path)) == 3
    assert tune.tune(product, "int8", [wrong], 32, Journal(None, "tune"), tiny=True) is None


@pytest.mark.parametrize("text", ["[]", "{", f'{{"layout": {LAYOUT_VERSION}}}'])
def test_a_damaged_table_is_one_sentence(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no table of measured settings: remove it"):
        tune.read(path)


def test_a_table_that_cannot_be_written_is_said_and_no_more(capsys, tmp_path):
    (tmp_path / "file").touch()
    table = tmp_path / "file" / "table.json"
    tune.write(table, H100, [])
    assert f"Cannot write {table}" in capsys.readouterr().err


def test_no_product_is_begun_when_little_time_is_left(tmp_path):
    table, path = tmp_path / "test.json", tmp_path / "rows.jsonl"
    tune.main(["--tiny", "--seconds", "1", "--table", str(table), "--rows", str(path)])
    rows = journal.read(path)
    assert not table.exists() and len(rows) == 4 and all("10 s left" in row["skipped"] for row in rows)


def test_the_whole_grid_fills_a_step_and_a_row():
    with compiling_for(H100):
        for m, k, operand in [(4608, 3072, "int8"), (4608, 15360, "bfloat16"), (1, 3072, "int8"), (1, 128, "int8")]:
            product = Product(m, 3072, k, "none", 1, ())
            found = tiles.candidates(product, operand, HEAD, everything=True)
            assert found and all(k % settings.block_k == 0 for settings in found)
            assert all(tiles.suits(settings, product, operand) for settings in found)
    assert list(tiles.TRIES)[-1] == math.inf
