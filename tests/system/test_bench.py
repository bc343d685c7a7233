"""The benchmarks, at sizes that say nothing of speed: they end in one JSON object, and find what is wrong."""

import dataclasses
import json
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench import denoise, distill_steps, kernels, memory, products, report, synthetic, timing, tune
from flux_jax.config import dev, nano
from flux_jax.errors import UserError
from flux_jax.parts import abstract_part
from flux_jax.quantize import abstract_ternary, ternary_paths
from pallas_kernels import LAYOUT_VERSION, Target, compiling_for, unpack_ternary, validate
from pallas_kernels.settings import Settings, choose_settings, read_table


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_report_says_device_versions_and_commit(capsys, tmp_path):
    report.finish("name", {"value": 1.5}, save=tmp_path / "results" / "name.json")
    printed = last_line(capsys)
    assert printed == json.loads((tmp_path / "results" / "name.json").read_text())
    assert printed["figures"] == {"value": 1.5}
    assert printed["versions"]["jax"] == jax.__version__
    head = subprocess.run(["git", "-C", str(report.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (printed["commit"] or "").removesuffix("-dirty") == head.stdout.strip()


def test_table_aligns_words_left_and_numbers_right():
    lines = report.table(["gpu", "GB"], [["a10", 3.41234], ["h100", 12345.6], ["l20", None]]).splitlines()
    assert lines == ["gpu       GB", "----  ------", "a10     3.41", "h100  12,346", "l20        -"]


def test_a_users_mistake_is_one_sentence_and_a_status(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.kernels", "--tiny", "--shapes", "7x7"])
    assert report.run(kernels.main) == 2
    known = ", ".join(f"{n}x{k}" for n, k in products.shapes(nano()))
    assert capsys.readouterr().err == f"--shapes must name some of {known}.\n"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
@pytest.mark.parametrize("main", [distill_steps.main, kernels.main, tune.main])
def test_without_a_gpu_no_time_is_taken_unasked(main):
    with pytest.raises(UserError, match="add --tiny"):
        main([])


def test_steps_of_a_block_learn(capsys):
    distill_steps.main(["--tiny", "--steps", "3"])
    blocks = last_line(capsys)["figures"]["blocks"]
    assert [block["block"] for block in blocks] == ["double_block", "single_block"]
    for block in blocks:
        assert len(block["samples_us"]) == 3 and block["losses"][1] < block["losses"][0] < 1.5


def test_shapes_are_those_of_every_ternary_layer():
    found = products.shapes(dev())
    assert set(found) == set(ternary_paths(dev()).values())
    assert {n * k for n, k in found} >= {21504 * 3072, 3072 * 15360}
    assert "single_blocks.linear1" in found[21504, 3072]


def test_kernels_prints_every_implementation_and_its_error(capsys):
    kernels.main(["--tiny", "--shapes", "128x128", "--m", "5", "--samples", "2"])
    figures = last_line(capsys)["figures"]
    assert [row["implementation"] for row in figures["products"]] == list(products.IMPLEMENTATIONS)
    assert figures["wrong"] == 0
    assert all(len(row["samples_us"]) == 2 and row["seconds"] > 0 and row["error"] > 0 for row in figures["products"])


@pytest.mark.parametrize("name", ["bf16", "A8 scratch"])
def test_a_wrong_product_is_found(name):
    """One sign of one weight, of one channel, in 128 x 256."""
    x, dense, packed = products.operands(40, 128, 256)
    implementation = products.IMPLEMENTATIONS[name]
    weights = dense if implementation.weights == "dense" else packed
    right = products.expected(implementation.activations, x, weights)
    y = implementation.function(x, weights)
    assert products.error(y, right) <= products.LIMITS[implementation.activations]
    # A weight that is not zero, turned round: -1 and 1 differ in the upper bit of two, 01 and 11.
    code = np.argwhere(np.asarray(unpack_ternary(packed["packed"], 256)[0, :32]) != 0)[0, 0]
    wrong = {
        "weight": dense["weight"].at[0, 0].multiply(-1),
        "packed": packed["packed"].at[0, code].set(packed["packed"][0, code] ^ jnp.uint8(2)),
    }
    key = "weight" if implementation.weights == "dense" else "packed"
    y = implementation.function(x, {**weights, key: wrong[key]})
    assert products.error(y, right) > products.LIMITS[implementation.activations]
    assert products.error(y.at[0, 0].set(jnp.nan), right) == np.inf


def test_timing_runs_every_round_of_every_copy():
    """The loop's result is that of the last round; a callback counts the calls."""
    calls = []

    def operation(x, weights):
        jax.debug.callback(lambda: calls.append(1))
        return x * weights["matrix"] + weights["vector"][None]

    weights = {"matrix": jnp.full((2, 3), 2.0), "vector": jnp.arange(3.0)}
    copies = timing.copies(weights, 3)
    assert len(timing.copies({"matrix": jnp.zeros((2**20, 64))})) == timing.LEAST_COPIES
    program = timing.loop(operation, 4).lower(jnp.ones((2, 3)), copies).compile()
    outputs = program(jnp.ones((2, 3)), copies)
    jax.effects_barrier()
    assert len(calls) == 4 * 3
    for y in outputs:
        np.testing.assert_array_equal(y, [[2, 3, 4], [2, 3, 4]])


def test_tuning_writes_a_table_that_the_kernels_read(capsys, tmp_path, monkeypatch):
    table = tmp_path / "test.json"
    words = ["--tiny", "--shapes", "128x128", "--operands", "int8", "--table", str(table)]
    tune.main([*words, "--m", "20"])
    (row,) = read_table(table)
    assert last_line(capsys)["figures"]["rows"][0]["settings"] == row["settings"]
    assert len(row["trials"]) > 1 and all(t.get("samples_us") or t["failure"] for t in row["trials"])
    monkeypatch.setattr("pallas_kernels.settings.table_path", lambda _: table)
    other = Settings(64, 256, 256, 8, 4)
    table.write_text(json.dumps({"layout": LAYOUT_VERSION, "rows": [{**row, "settings": vars(other)}]}))
    read_table.cache_clear()
    assert choose_settings(Target("gpu", "9.0", "any"), 20, 128, 128, "int8") == other
    before = table.read_text()
    tune.main([*words, "--m", "20"])  # what is in the table already is not tried again
    assert table.read_text() == before
    read_table.cache_clear()


def test_settings_that_cannot_be_compiled_or_are_wrong_are_not_chosen(monkeypatch):
    good, bad, wrong = Settings(32, 64, 128, 4, 2), Settings(32, 64, 128, 8, 2), Settings(32, 64, 128, 2, 2)

    def kernel(x, weights, settings):
        if settings == bad:
            raise RuntimeError("too much shared memory\nand more")
        y = products.IMPLEMENTATIONS["A16 scratch"].function(x, weights)
        return y * 2 if settings == wrong else y

    monkeypatch.setattr(tune, "kernel", kernel)
    monkeypatch.setattr(tune, "choose_settings", lambda *_: bad)
    row = tune.tune(40, 128, 128, "bfloat16", [good, wrong], tiny=True)
    assert row["settings"] == vars(good) and row["seconds_before"] is None
    assert [t.get("failure", "")[:5] for t in row["trials"]] == ["too m", "", "wrong"]


def test_candidates_fill_a_step_and_a_row():
    for m, k, operand in [(4608, 3072, "int8"), (4608, 15360, "bfloat16"), (1, 3072, "int8"), (1, 128, "int8")]:
        found = tune.candidates(m, k, operand)
        assert found and all(k % settings.block_k == 0 for settings in found)


def test_synthetic_weights_are_valid_and_paint_finite_numbers():
    blocks = dataclasses.replace(nano().transformer, num_double_blocks=1, num_single_blocks=1)
    config = dataclasses.replace(nano(), transformer=blocks)
    transformer = synthetic.weights(memory.abstract_transformer(config, "ternary A8"))
    for path, variable in nnx.to_flat_state(nnx.state(transformer)):
        if path[-1] == "packed":
            validate(np.asarray(variable[...]), 4 * variable.shape[-1])
        assert bool(jnp.asarray(variable[...]).any()), path
    found = denoise.trial("ternary A8", config, [1], 1)
    assert found["pictures"][0]["finite"] and len(found["pictures"][0]["seconds"]) == 1


def test_denoise_reports_each_trial_and_what_failed(capsys, monkeypatch, tmp_path):
    picture = {"steps": 2, "seconds": [4.0, 2.0, 3.0], "joules": 700.0, "finite": True}
    answers = {
        "bf16": {"compile_seconds": 1.0, "peak_bytes": 24_000_000_000, "pictures": [picture]},
        "diffusers bf16": {"failure": "torch is not installed"},
    }

    def process(words, **_):
        answer = answers[words[words.index("--trial") + 1]]
        if "failure" in answer:
            return types.SimpleNamespace(returncode=2, stdout="", stderr=answer["failure"] + "\n")
        return types.SimpleNamespace(returncode=0, stdout=json.dumps(answer) + "\n", stderr="")

    monkeypatch.setattr(report.subprocess, "run", process)
    monkeypatch.setattr(denoise, "report", types.SimpleNamespace(**vars(report) | {"finish": lambda *_, **__: None}))
    monkeypatch.setattr(denoise.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(denoise, "chart", lambda path, title, found: path.write_text(title))
    denoise.main(["--trials", *answers, "--steps", "2", "--save", str(tmp_path / "denoise.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["bf16", "2", "3", "1,500", "24", "700"]
    assert lines[-1].endswith("torch is not installed")
    assert (tmp_path / "denoise.png").exists()


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


def test_the_loops_reading_is_counted_from_what_it_carries():
    """The same text with and without one modulation weight among the loop's operands."""
    transformer = abstract_part("transformer", nano(), jnp.bfloat16)
    mod = ",".join(map(str, transformer.single_blocks.mod.weight.shape))
    linear = transformer.single_blocks.linear1.weight
    carried = f"s32[], bf16[{','.join(map(str, linear.shape))}]{{2,1,0}}"
    line = ') while(%t), condition=%c, body=%b, metadata={op_name="jit(denoise)/denoise/while"}'
    inner = '%w = (bf16[1,2]) while(%t), metadata={op_name="jit(denoise)/denoise/while/body/while"}\n'
    assert memory.read_in_loop(f"{inner}%w.1 = ({carried}{line}", transformer) == (memory.leaf_bytes(linear), 0)
    _, modulation = memory.read_in_loop(f"{inner}%w.1 = ({carried}, /*index=5*/bf16[{mod}]{{2,1,0}}{line}", transformer)
    assert modulation == memory.leaf_bytes(transformer.single_blocks.mod.weight)
    with pytest.raises(ValueError, match="no loop"):
        memory.read_in_loop(inner, transformer)


def test_bits_of_a_weight_lie_between_its_entropy_and_what_is_held():
    found = memory.stored_bits(256, 1024, "least-squares")
    assert 1.5 < found["entropy"] < 1.585 < found["disk"] < 2.05
    assert found["memory"] == 2 + 32 / 1024


def test_ternary_leaves_of_flux_dev_take_a_seventh():
    """From shapes alone, before any compiler: the parameters of the plan, at two bits and a scale each."""
    held = sum(memory.leaf_bytes(leaf) for leaf in jax.tree.leaves(abstract_ternary(dev(), jnp.bfloat16)))
    dense = sum(memory.leaf_bytes(leaf) for leaf in jax.tree.leaves(abstract_part("transformer", dev(), jnp.bfloat16)))
    assert dense == 2 * 11_901_408_320
    assert dense / held > 7.6


def test_the_committed_memory_meets_the_goals():
    """At most 3.6 GB, and 6.8 times less than bf16, on every GPU; no modulation weights in the loop."""
    programs = json.loads((report.RESULTS / "memory.json").read_text())["figures"]["programs"]
    assert {(row["gpu"], row["weights"]) for row in programs} == {(g, w) for g in memory.GPUS for w in memory.WEIGHTS}
    for row in programs:
        assert row["modulation_bytes_in_loop"] == 0 < row["cudnn_attention_calls"]
        if row["weights"] != "bf16":
            assert row["total_bytes"] <= 3.6e9 and row["times_smaller"] >= 6.8 and row["triton_kernel_calls"]


def test_interpreted_kernels_stand_in_for_a_gpu():
    with compiling_for(Target("interpret", "9.0")):
        x, _, packed = products.operands(3, 16, 128)
        y = products.kernel(x, packed)
    assert products.error(y, products.expected("bf16", x, packed)) <= products.LIMITS["bf16"]
